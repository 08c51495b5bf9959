package gro

// block is the unit in which an Arena grows.
const block = 256 << 10

// Arena is memory for the packets of one batch that have too little room where
// they came. It keeps what it has grown to. The zero value is ready.
type Arena struct {
	blocks [][]byte
	block  int // the one in use
	at     int // where it is free
}

// Take returns n octets, at most 256 KiB, which last until Reset and hold
// anything.
func (a *Arena) Take(n int) []byte {
	if a.block < len(a.blocks) && a.at+n > block {
		a.block, a.at = a.block+1, 0
	}
	if a.block == len(a.blocks) {
		a.blocks = append(a.blocks, make([]byte, block))
	}
	b := a.blocks[a.block][a.at : a.at+n : a.at+n]
	a.at += n
	return b
}

// Taken is no less than what was taken since Reset, and no more than a block for
// each that is not as full as it could be besides.
func (a *Arena) Taken() int { return a.block*block + a.at }

// Reset takes all back.
func (a *Arena) Reset() { a.block, a.at = 0, 0 }

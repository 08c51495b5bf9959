package wire

import (
	"bytes"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// watch finds out whether somebody captures on the interface (tcpdump), who is
// to see what we send: neither AF_XDP nor PACKET_QDISC_BYPASS shows it. The
// kernel tells nobody of such sockets, so the list of them is read when packets
// are to be sent, at most every watchEvery.
type watch struct {
	file  *os.File // nil: no such list
	own   uint64   // inode of the reader's socket
	index int
	buf   [1 << 16]byte
	last  time.Duration // since started
	seen  bool
}

const watchEvery = 20 * time.Millisecond

func (c *watch) open(index int, reader syscall.RawConn) {
	c.index = index
	c.last = -watchEvery
	if reader == nil || reader.Control(func(fd uintptr) {
		var st unix.Stat_t
		if unix.Fstat(int(fd), &st) == nil {
			c.own = st.Ino
		}
	}) == nil {
		c.file, _ = os.Open("/proc/self/net/packet") // without it nobody is seen
	}
}

func (c *watch) close() {
	if c.file != nil {
		c.file.Close()
	}
}

// look reports whether there is a capture. It does not allocate.
func (c *watch) look() bool {
	now := time.Since(started)
	if c.file == nil || now-c.last < watchEvery {
		return c.seen
	}
	c.last = now
	if n, err := c.file.ReadAt(c.buf[:], 0); err == nil || err == io.EOF {
		c.seen = captures(c.buf[:n], c.index, c.own)
	}
	return c.seen
}

// captures reads a /proc/net/packet:
//
//	sk  RefCnt Type Proto  Iface R Rmem   User   Inode
//	... 3      3    0003   2     1 0      0      12345
//
// Who receives every protocol (ETH_P_ALL) also receives what is sent.
func captures(b []byte, index int, own uint64) bool {
	for len(b) > 0 {
		line, rest, _ := bytes.Cut(b, []byte("\n"))
		b = rest
		var f [9][]byte
		n := 0
		for n < len(f) {
			line = bytes.TrimLeft(line, " ")
			if len(line) == 0 {
				break
			}
			end := bytes.IndexByte(line, ' ')
			if end < 0 {
				end = len(line)
			}
			f[n], line = line[:end], line[end:]
			n++
		}
		if n < len(f) || string(f[3]) != "0003" || string(f[5]) != "1" {
			continue
		}
		if i := number(f[4]); (i == 0 || i == uint64(index)) && number(f[8]) != own {
			return true
		}
	}
	return false
}

// number reads a decimal number, as far as it is one.
func number(b []byte) (n uint64) {
	for _, c := range b {
		if c < '0' || c > '9' {
			break
		}
		n = n*10 + uint64(c-'0')
	}
	return n
}

// Package aggfrag is the AGGFRAG_PAYLOAD of ESP (RFC 9347, 6.1): several inner
// packets in one ESP packet, and inner packets cut to fit several.
//
//	sub-type 0  | 0 | reserved | BlockOffset 2 | data blocks ...
//	sub-type 1  | 1 | reserved, P, E | BlockOffset 2 | congestion information 20 | data blocks ...
//
// A data block is an IPv4 or IPv6 packet, told by its version and as long as it
// says itself, or padding (version 0) up to the end. BlockOffset is where the
// first block begins that begins here; what is in front continues a block of
// an ESP packet before.
//
// What is sent here is sub-type 0 with whole packets: HeaderLen zero octets,
// then packet after packet, no padding. Cutting packets would save the rest of
// an ESP packet now and then, at the price of a second inner packet with each
// that is lost. Everything that RFC 9347 lets a peer send is received, fragments
// in a Reassembler; congestion information is skipped. Nothing is ever delayed
// or sent at a constant rate: this is the aggregation of RFC 9347, not its
// traffic flow confidentiality (IP-TFS).
package aggfrag

import (
	"encoding/binary"
	"errors"
)

// Protocol is the next header of an ESP packet with an AGGFRAG_PAYLOAD.
const Protocol = 144

// HeaderLen is the length of the header of sub-type 0, which is all zero if
// the first block begins right behind it.
const HeaderLen = 4

// ccHeaderLen is that of sub-type 1.
const ccHeaderLen = 24

// subCC is the higher of the two sub-types.
const subCC = 1

// maxBlock is the length of the longest block, an IPv6 packet.
const maxBlock = 40 + 65535

// ErrMalformed: a payload that is too short for its header, or of an unknown
// sub-type, which receivers drop (RFC 9347, 6.1).
var ErrMalformed = errors.New("malformed AGGFRAG payload")

// PutHeader writes a header for payloads that begin with a block.
func PutHeader(b []byte) { clear(b[:HeaderLen]) }

// Unpacker takes one payload apart. It refers to the payload and allocates
// nothing.
type Unpacker struct {
	head  []byte // continues an earlier block
	more  bool   // which goes on beyond this payload
	data  []byte // whole blocks still to come
	tail  []byte // of a block that goes on beyond this payload
	count int    // whole blocks
	bad   bool   // something that is no block ends them
}

// Reset begins with the payload b, what ESP carried. ErrMalformed says that b,
// or what follows the packets that Next will give, is not as RFC 9347 has it.
func (u *Unpacker) Reset(b []byte) error {
	*u = Unpacker{}
	if len(b) < HeaderLen {
		u.bad = true
		return ErrMalformed
	}
	h := HeaderLen
	if b[0] == subCC {
		h = ccHeaderLen
	}
	if b[0] > subCC || len(b) < h {
		u.bad = true
		return ErrMalformed
	}
	offset, data := int(binary.BigEndian.Uint16(b[2:])), b[h:]
	if offset > len(data) {
		u.head, u.more = data, true // no block begins here
		return nil
	}
	u.head, data = data[:offset], data[offset:]
	at := 0
	for at < len(data) && data[at]>>4 != 0 {
		n, known := blockLen(data[at:])
		if known && n == 0 {
			u.bad = true
			break
		}
		if !known || n > len(data)-at {
			u.tail = data[at:]
			break
		}
		u.count++
		at += n
	}
	u.data = data[:at]
	if u.bad {
		return ErrMalformed
	}
	return nil
}

// Len is how many whole packets the payload has.
func (u *Unpacker) Len() int { return u.count }

// Next is the next whole packet, nil after the last. It is as long as its IP
// header says, and not shorter than one.
func (u *Unpacker) Next() []byte {
	if len(u.data) == 0 {
		return nil
	}
	n, _ := blockLen(u.data)
	b := u.data[:n:n]
	u.data = u.data[n:]
	return b
}

// Fragments reports whether the payload concerns a Reassembler: it has
// fragments, or nothing at all, which may stand between fragments (RFC 9347,
// 2.2.3).
func (u *Unpacker) Fragments() bool {
	return len(u.head) > 0 || u.more || len(u.tail) > 0 || u.empty()
}

func (u *Unpacker) empty() bool {
	return len(u.head) == 0 && len(u.tail) == 0 && u.count == 0 && !u.bad
}

// blockLen is the length of the packet at the front of d, 0 if it is none;
// false: too little of it to tell.
func blockLen(d []byte) (n int, known bool) {
	switch d[0] >> 4 {
	case 4:
		if len(d) < 4 {
			return 0, false
		}
		if n = int(binary.BigEndian.Uint16(d[2:])); n < 20 {
			n = 0
		}
		return n, true
	case 6:
		if len(d) < 6 {
			return 0, false
		}
		return 40 + int(binary.BigEndian.Uint16(d[4:])), true
	}
	return 0, true
}

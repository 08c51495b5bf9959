package frag

import (
	"bytes"
	"encoding/binary"
	"errors"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

// ErrMTU: the packet cannot be cut for this MTU: not even 8 octets fit behind
// the header, or, over IPv6, not the whole chain of headers in the first
// fragment (RFC 7112).
var ErrMTU = errors.New("MTU too small for fragments")

// Split cuts the packet b, decoded in i, into fragments of at most mtu octets
// and gives each to emit, in order, in a buffer that is emit's until it
// returns; a packet that fits is given as it is. An error of emit ends it.
//
// id is the identification; an IPv4 packet that has one, or a packet that
// already is a fragment, keeps its own. Of IPv4 options the later fragments
// have those with the copied flag (RFC 791, 3.1). DF stays as it is: whether it
// forbids cutting is the caller's rule.
func Split(b []byte, i *packet.Info, mtu int, id uint32, emit func([]byte) error) error {
	if i.Len <= mtu {
		return emit(b[:i.Len])
	}
	if mtu <= 0 {
		return ErrMTU
	}
	switch i.Version {
	case 4:
		return split4(b[:i.Len], i, mtu, id, emit)
	case 6:
		return split6(b[:i.Len], i, mtu, id, emit)
	}
	return ErrNotIP
}

// ErrNotIP: Split was given what Decode refused.
var ErrNotIP = errors.New("not an IP packet")

func split4(b []byte, i *packet.Info, mtu int, id uint32, emit func([]byte) error) error {
	header := b[:i.HdrLen]
	later := laterHeader(header)
	data := b[i.HdrLen:]
	buf := make([]byte, 0, mtu)
	if i.ID == 0 && !i.IsFragment() {
		header = bytes.Clone(header)
		binary.BigEndian.PutUint16(header[4:], uint16(id))
		binary.BigEndian.PutUint16(later[4:], uint16(id))
	}
	for off, h := 0, header; off < len(data); h = later {
		n := len(data) - off
		more := i.MF
		if n > mtu-len(h) {
			n, more = (mtu-len(h))&^7, true
		}
		if n <= 0 {
			return ErrMTU
		}
		f := append(append(buf[:0], h...), data[off:off+n]...)
		packet.SetLen(f, len(f))
		v := uint16(i.FragOff+off) / 8
		if more {
			v |= 0x2000
		}
		if i.DF {
			v |= 0x4000
		}
		binary.BigEndian.PutUint16(f[6:], v)
		packet.FixIPv4Checksum(f)
		if err := emit(f); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// laterHeader is an IPv4 header for fragments behind the first: with the
// options that have the copied flag only, padded with End of Option List.
func laterHeader(h []byte) []byte {
	out := append(make([]byte, 0, len(h)), h[:packet.IPv4Len]...)
	for o := h[packet.IPv4Len:]; len(o) > 0; {
		n := 1
		switch o[0] {
		case 0: // End of Option List
			n = len(o)
		case 1: // No Operation
		default:
			if len(o) < 2 || int(o[1]) < 2 || int(o[1]) > len(o) {
				n = len(o) // malformed: not copied, what follows neither
				break
			}
			n = int(o[1])
			if o[0]&0x80 != 0 {
				out = append(out, o[:n]...)
			}
		}
		o = o[n:]
	}
	for len(out)%4 != 0 {
		out = append(out, 0)
	}
	out[0] = 0x40 | byte(len(out)/4)
	return out
}

func split6(b []byte, i *packet.Info, mtu int, id uint32, emit func([]byte) error) error {
	// The fragment header stands behind what routers read (RFC 8200, 4.5).
	at, protoOff, next, data := i.TransOff, i.TransProtoOff, b[i.TransProtoOff], b[i.TransOff:]
	if i.FragHdr != 0 {
		at, protoOff, next, data = i.FragHdr, i.FragProtoOff, b[i.FragHdr], b[i.FragHdr+8:]
		id = i.ID
	}
	room := (mtu - at - 8) &^ 7
	chain := i.HdrLen - (i.Len - len(data))
	if room <= 0 || i.FragOff == 0 && room < chain {
		return ErrMTU
	}
	buf := make([]byte, 0, mtu)
	for off := 0; off < len(data); {
		n, more := len(data)-off, i.MF
		if n > mtu-at-8 {
			n, more = room, true
		}
		f := append(buf[:0], b[:at]...)
		f[protoOff] = 44
		v := uint16(i.FragOff + off)
		if more {
			v |= 1
		}
		f = append(f, next, 0, byte(v>>8), byte(v))
		f = binary.BigEndian.AppendUint32(f, id)
		f = append(f, data[off:off+n]...)
		packet.SetLen(f, len(f))
		if err := emit(f); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// Package explain says of a captured IKE_SA_INIT how our side would answer it, by
// which rule, and why not by others: what `ike explain` does. It needs neither a
// network nor privilege nor secrets, only a capture and rules.
//
// What the answer would be is not worked out here: the machine itself
// (pkg/ike/sa) is given the message. Captures are taken for hostile; everything
// that is read is bounded.
package explain

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Bounds of captures.
const (
	maxFrame      = 1 << 18 // octets of a frame
	maxInterfaces = 4096    // of a section
)

// Link types (https://www.ietf.org/archive/id/draft-ietf-opsawg-pcaplinktype-00.txt).
const (
	linkNull     = 0
	linkEthernet = 1
	linkRaw      = 101
	linkLoop     = 108
	linkSLL      = 113
	linkIPv4     = 228
	linkIPv6     = 229
	linkSLL2     = 276
)

var errFormat = errors.New("neither pcap nor pcapng")

// frames calls f for each frame of a capture in pcap or pcapng format, in order.
// An error of f ends it. n is the number of the frame, from 1; data is valid
// during the call only.
func frames(r io.Reader, f func(n int, link uint32, data []byte) error) error {
	b := bufio.NewReader(r)
	magic, err := b.Peek(4)
	switch {
	case err == io.EOF && len(magic) == 0:
		return errors.New("empty")
	case err == io.EOF:
		return errFormat
	case err != nil: // such as of a directory
		return err
	}
	switch le, be := binary.LittleEndian.Uint32(magic), binary.BigEndian.Uint32(magic); {
	case le == 0xa1b2c3d4 || le == 0xa1b23c4d:
		return pcap(b, binary.LittleEndian, f)
	case be == 0xa1b2c3d4 || be == 0xa1b23c4d:
		return pcap(b, binary.BigEndian, f)
	case be == blockSection:
		return pcapng(b, f)
	}
	return errFormat
}

// pcap reads the classic format: a header of 24 octets, then for each frame 16
// octets (time, captured and original length) and the octets captured.
func pcap(r io.Reader, o binary.ByteOrder, f func(int, uint32, []byte) error) error {
	var head [24]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return errFormat
	}
	link := o.Uint32(head[20:]) & 0xffff // above: about checksums
	buf := make([]byte, 0, 2048)
	for n := 1; ; n++ {
		var h [16]byte
		switch _, err := io.ReadFull(r, h[:]); {
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("frame %d: cut off", n)
		}
		size := o.Uint32(h[8:])
		if size > maxFrame {
			return fmt.Errorf("frame %d: %d octets; want %d at most", n, size, maxFrame)
		}
		var err error
		if buf, err = fill(r, buf, int(size)); err != nil {
			return fmt.Errorf("frame %d: cut off", n)
		}
		if err := f(n, link, buf); err != nil {
			return err
		}
	}
}

// fill reads n octets into buf, which it makes larger as they come.
func fill(r io.Reader, buf []byte, n int) ([]byte, error) {
	if cap(buf) < n {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	_, err := io.ReadFull(r, buf)
	return buf, err
}

// Blocks of pcapng.
const (
	blockSection   = 0x0a0d0d0a
	blockInterface = 1
	blockSimple    = 3
	blockEnhanced  = 6
)

// pcapng reads blocks: type, total length, body padded to 32 bits, total length
// again. The byte order is that of the section.
func pcapng(r *bufio.Reader, f func(int, uint32, []byte) error) error {
	var o binary.ByteOrder = binary.LittleEndian
	var links []uint32 // by interface
	var snaps []uint32
	var buf []byte
	n := 0
	for {
		var h [12]byte
		switch _, err := io.ReadFull(r, h[:8]); {
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("after frame %d: cut off", n)
		}
		typ := o.Uint32(h[:])
		used := uint32(8)
		if binary.BigEndian.Uint32(h[:]) == blockSection { // the same in either order
			typ = blockSection
			if _, err := io.ReadFull(r, h[8:]); err != nil {
				return fmt.Errorf("after frame %d: cut off", n)
			}
			switch {
			case binary.LittleEndian.Uint32(h[8:]) == 0x1a2b3c4d:
				o = binary.LittleEndian
			case binary.BigEndian.Uint32(h[8:]) == 0x1a2b3c4d:
				o = binary.BigEndian
			default:
				return errFormat
			}
			links, snaps = nil, nil
			used = 12
		}
		total := o.Uint32(h[4:])
		if total < 12 || total%4 != 0 || total < used+4 {
			return fmt.Errorf("after frame %d: block of %d octets", n, total)
		}
		rest := total - used
		switch typ {
		case blockInterface, blockSimple, blockEnhanced:
		default:
			if _, err := io.CopyN(io.Discard, r, int64(rest)); err != nil {
				return fmt.Errorf("after frame %d: cut off", n)
			}
			continue
		}
		if rest > 2*maxFrame {
			return fmt.Errorf("after frame %d: block of %d octets", n, total)
		}
		var err error
		if buf, err = fill(r, buf, int(rest)); err != nil {
			return fmt.Errorf("after frame %d: cut off", n)
		}
		body := buf[:rest-4]
		switch typ {
		case blockInterface:
			if len(body) < 8 || len(links) >= maxInterfaces {
				return fmt.Errorf("after frame %d: interface block of %d octets, number %d", n, total, len(links)+1)
			}
			links, snaps = append(links, uint32(o.Uint16(body))), append(snaps, o.Uint32(body[4:]))
			continue
		case blockEnhanced:
			n++
			if len(body) < 20 {
				return fmt.Errorf("frame %d: block of %d octets", n, total)
			}
			i, size := o.Uint32(body), o.Uint32(body[12:])
			if int64(i) >= int64(len(links)) || size > maxFrame || int64(size) > int64(len(body)-20) {
				return fmt.Errorf("frame %d: %d octets of interface %d in a block of %d", n, size, i, total)
			}
			err = f(n, links[i], body[20:20+size])
		case blockSimple:
			n++
			if len(body) < 4 || len(links) == 0 {
				return fmt.Errorf("frame %d: block of %d octets, without interface", n, total)
			}
			size := min(o.Uint32(body), uint32(len(body)-4))
			if snaps[0] != 0 {
				size = min(size, snaps[0])
			}
			err = f(n, links[0], body[4:4+size])
		}
		if err != nil {
			return err
		}
	}
}

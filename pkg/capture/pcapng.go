package capture

import (
	"encoding/binary"
	"io"
	"time"
)

// Blocks and options of pcapng (draft-ietf-opsawg-pcapng), in little-endian order.
const (
	blockSection    = 0x0a0d0d0a
	blockInterface  = 1
	blockStatistics = 5
	blockPacket     = 6 // enhanced

	byteOrderMagic = 0x1a2b3c4d

	optEnd         = 0
	optComment     = 1
	optName        = 2 // of an interface
	optDescription = 3
	optUserAppl    = 4 // of a section
	optTSResol     = 9
	optFlags       = 2 // of a packet
	optDropCount   = 4
	optIfRecv      = 4 // of statistics
	optIfDrop      = 5

	tsNano = 9 // time in units of 10^-9 s
)

// Writer writes a pcapng file of both sides. Every block is one Write, so that
// what has been captured is whole whenever the program ends.
type Writer struct {
	w    io.Writer
	b    []byte
	ids  [2]int // of a side in the file
	recv [2]uint64
	lost [2]uint64
}

// NewWriter writes the head of a file: the section, with the name of the
// program that captures, and an interface for each of sides.
func NewWriter(w io.Writer, app string, sides Sides, ifs func(Side) Interface) (*Writer, error) {
	p := &Writer{w: w}
	p.begin(blockSection)
	p.u32(byteOrderMagic)
	p.u16(1) // version 1.0
	p.u16(0)
	p.u64(1<<64 - 1) // length of the section: unknown
	p.option(optUserAppl, []byte(app))
	if err := p.end(); err != nil {
		return nil, err
	}
	n := 0
	for _, side := range []Side{Low, High} {
		if !sides.Has(side) {
			continue
		}
		p.ids[side] = n
		n++
		i := ifs(side)
		p.begin(blockInterface)
		p.u16(i.Link)
		p.u16(0)
		p.u32(MaxData)
		p.option(optName, []byte(i.Name))
		p.option(optDescription, []byte(side.String()))
		p.option(optTSResol, []byte{tsNano})
		if err := p.end(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Write appends a frame: time in nanoseconds, direction, what was lost before
// it, and the comment.
func (p *Writer) Write(f *Frame) error {
	p.recv[f.Side]++
	p.lost[f.Side] += uint64(f.Lost)
	p.begin(blockPacket)
	p.u32(uint32(p.ids[f.Side]))
	p.time(f.Time)
	p.u32(uint32(len(f.Data)))
	p.u32(uint32(f.Len))
	p.padded(f.Data)
	p.option(optFlags, binary.LittleEndian.AppendUint32(nil, uint32(f.Dir)))
	if f.Lost != 0 {
		p.option(optDropCount, binary.LittleEndian.AppendUint64(nil, uint64(f.Lost)))
	}
	if f.Comment != "" {
		p.option(optComment, []byte(f.Comment))
	}
	return p.end()
}

// Close writes how many frames of each of sides there were, and were lost. It
// does not close the file.
func (p *Writer) Close(sides Sides) error {
	for _, side := range []Side{Low, High} {
		if !sides.Has(side) {
			continue
		}
		p.begin(blockStatistics)
		p.u32(uint32(p.ids[side]))
		p.time(time.Now())
		p.option(optIfRecv, binary.LittleEndian.AppendUint64(nil, p.recv[side]+p.lost[side]))
		p.option(optIfDrop, binary.LittleEndian.AppendUint64(nil, p.lost[side]))
		if err := p.end(); err != nil {
			return err
		}
	}
	return nil
}

func (p *Writer) u16(v uint16) { p.b = binary.LittleEndian.AppendUint16(p.b, v) }
func (p *Writer) u32(v uint32) { p.b = binary.LittleEndian.AppendUint32(p.b, v) }
func (p *Writer) u64(v uint64) { p.b = binary.LittleEndian.AppendUint64(p.b, v) }

// time is its upper half, then the lower.
func (p *Writer) time(t time.Time) {
	n := uint64(t.UnixNano())
	p.u32(uint32(n >> 32))
	p.u32(uint32(n))
}

// padded appends b to a multiple of four octets.
func (p *Writer) padded(b []byte) {
	p.b = append(p.b, b...)
	p.b = append(p.b, make([]byte, -len(b)&3)...)
}

func (p *Writer) option(code uint16, v []byte) {
	p.u16(code)
	p.u16(uint16(len(v)))
	p.padded(v)
}

func (p *Writer) begin(kind uint32) {
	p.b = p.b[:0]
	p.u32(kind)
	p.u32(0) // see end
}

// end writes the block, with its length at both ends.
func (p *Writer) end() error {
	p.option(optEnd, nil)
	n := uint32(len(p.b) + 4)
	binary.LittleEndian.PutUint32(p.b[4:], n)
	p.u32(n)
	_, err := p.w.Write(p.b)
	return err
}

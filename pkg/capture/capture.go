// Package capture shows the frames on both sides of the transform: on the side
// of the kernel (high) what applications send and get, on that of the network
// (low) what is on the wire. A Hub, in missiu, gives copies of them to readers on
// a Unix socket; a Reader, in `missiu monitor`, prints them as lines (Line) or
// writes them as pcapng (Writer).
//
//	high    TAP, kernel   |  SPD, SAD, ESP  |  interface, network    low
//	            '-----------> Tape, Hub <----------'
//	                             |
//	         /run/missiu/<if>.monitor, SOCK_SEQPACKET
//	                             |
//	                          Reader -> Line, Writer
//
// As long as there is no reader, all that a worker of the data path does is one
// atomic load a batch (Hub.Active). A reader that is too slow loses frames, and
// is told with the next one how many; the data path never waits.
//
// One packet on the socket is one message. The client begins with a request:
//
//	octet  0  version = 1
//	       1  sides: 1 low, 2 high, 3 both
//	    2, 3  reserved = 0
//
// The server answers with a description of each side, and goes on with frames.
// Numbers are big-endian.
//
//	interface               frame
//	octet  0  type = 1      octet  0  type = 2
//	       1  side: 0 low          1  side
//	          1 high               2  direction: 1 in, 2 out
//	    2, 3  link type            3  reserved = 0
//	    4...  name              4- 7  frames of this side lost since the last one
//	                            8-15  time, nanoseconds since 1970
//	                           16-19  length of the frame on its link
//	                           20-21  length of the comment
//	                          22-...  comment, frame
//
// Directions are those of the interface that the frame is seen at: what the
// kernel sends through the TAP is "out" at high, and "out" again at low.
package capture

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Purpose names the socket for package attach.
const Purpose = "monitor"

// Side of the transform. Numbers are those of the messages, and of the
// interfaces in a file.
type Side uint8

// Sides.
const (
	Low  Side = 0 // the network
	High Side = 1 // the kernel
)

func (s Side) String() string {
	if s == High {
		return "high"
	}
	return "low"
}

// Sides is a set of them.
type Sides uint8

// Sets of sides.
const (
	OnlyLow  Sides = 1 << Low
	OnlyHigh Sides = 1 << High
	Both     Sides = OnlyLow | OnlyHigh
)

// Has reports whether side is in s.
func (s Sides) Has(side Side) bool { return s>>side&1 != 0 }

// Direction as seen from the host; numbers are those of epb_flags.
type Direction uint8

// Directions.
const (
	In  Direction = 1
	Out Direction = 2
)

func (d Direction) String() string {
	switch d {
	case In:
		return "in"
	case Out:
		return "out"
	}
	return fmt.Sprintf("Direction(%d)", uint8(d))
}

// Link types of pcap (https://www.ietf.org/archive/id/draft-ietf-opsawg-pcaplinktype-09.html).
const (
	LinkEthernet = 1
	LinkIP       = 101 // IPv4 or IPv6, as the first nibble says
)

// Interface is what one side is.
type Interface struct {
	Name string // of the device; at most 64 octets
	Link uint16
}

// Frame is one frame at one side.
type Frame struct {
	Side    Side
	Dir     Direction
	Time    time.Time
	Len     int    // on its link; Data may be less
	Lost    uint32 // frames of this side that the reader lost since the last one
	Comment string // the name of a counter, such as drop_in_replay; empty if the frame went on
	Data    []byte
}

// MaxData is how many octets of a frame are kept: all of any that a TAP gives.
const MaxData = 14 + 4 + 65535

const (
	version       = 1
	requestLen    = 4
	typeInterface = 1
	typeFrame     = 2
	ifHeader      = 4
	frameHeader   = 22
	maxName       = 64
	maxComment    = 256
	// MaxMessage is the length of the longest message, in octets.
	MaxMessage = frameHeader + maxComment + MaxData
)

// FormatError says what is wrong with a message.
type FormatError struct{ Reason string }

func (e *FormatError) Error() string { return "capture: " + e.Reason }

func appendRequest(b []byte, s Sides) []byte { return append(b, version, byte(s), 0, 0) }

func parseRequest(b []byte) (Sides, error) {
	switch {
	case len(b) != requestLen:
		return 0, &FormatError{"request of a wrong length"}
	case b[0] != version || b[2] != 0 || b[3] != 0:
		return 0, &FormatError{"unknown version"}
	case b[1] == 0 || Sides(b[1]) > Both:
		return 0, &FormatError{"unknown side"}
	}
	return Sides(b[1]), nil
}

func appendInterface(b []byte, side Side, i *Interface) []byte {
	b = append(b, typeInterface, byte(side))
	b = binary.BigEndian.AppendUint16(b, i.Link)
	return append(b, i.Name[:min(len(i.Name), maxName)]...)
}

// append appends the message of f to b, cut to what a message may hold.
func (f *Frame) append(b []byte) []byte {
	data, comment := f.Data[:min(len(f.Data), MaxData)], f.Comment[:min(len(f.Comment), maxComment)]
	b = append(b, typeFrame, byte(f.Side), byte(f.Dir), 0)
	b = binary.BigEndian.AppendUint32(b, f.Lost)
	b = binary.BigEndian.AppendUint64(b, uint64(f.Time.UnixNano()))
	b = binary.BigEndian.AppendUint32(b, uint32(f.Len))
	b = binary.BigEndian.AppendUint16(b, uint16(len(comment)))
	b = append(b, comment...)
	return append(b, data...)
}

// message is an interface or a frame.
type message struct {
	side  Side
	iface *Interface // nil: a frame
	frame Frame
}

// parse takes a message apart; the data of a frame lies in b.
func parse(b []byte) (m message, err error) {
	if len(b) < ifHeader || b[1] > byte(High) {
		return m, &FormatError{"neither interface nor frame"}
	}
	m.side = Side(b[1])
	switch {
	case b[0] == typeInterface:
		if len(b) > ifHeader+maxName {
			return m, &FormatError{"name of an interface too long"}
		}
		m.iface = &Interface{Name: string(b[ifHeader:]), Link: binary.BigEndian.Uint16(b[2:])}
		return m, nil
	case b[0] != typeFrame || len(b) < frameHeader || b[3] != 0 || b[2] != byte(In) && b[2] != byte(Out):
		return m, &FormatError{"neither interface nor frame"}
	}
	n := int(binary.BigEndian.Uint16(b[20:]))
	if n > maxComment || len(b) < frameHeader+n || len(b)-frameHeader-n > MaxData {
		return m, &FormatError{"lengths of a frame do not fit"}
	}
	m.frame = Frame{
		Side: m.side, Dir: Direction(b[2]), Lost: binary.BigEndian.Uint32(b[4:]),
		Time: time.Unix(0, int64(binary.BigEndian.Uint64(b[8:]))), Len: int(binary.BigEndian.Uint32(b[16:])),
		Comment: string(b[frameHeader : frameHeader+n]), Data: b[frameHeader+n:],
	}
	if m.frame.Len < len(m.frame.Data) {
		return m, &FormatError{"frame shorter than its data"}
	}
	return m, nil
}

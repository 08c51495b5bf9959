// Package tap is the TAP device through which the kernel's stack and missiu
// exchange Ethernet frames: batches, headroom and the metadata of segmentation
// and checksum offload in front of /dev/net/tun. Only pkg/datapath, wire and
// the main of missiu call it; netlink and water stay behind it.
//
// It may be a TUN as well, which has neither link nor neighbours. Its packets
// wear an Ethernet header here that the kernel never sees, put on and taken off
// in place, so that callers and offsets are those of a TAP:
//
//	            Off                Off+14
//	in memory   | Ethernet         | IP ...
//	TAP   | vnet| Ethernet         | IP ...       vnet: struct virtio_net_hdr
//	TUN              | vnet        | IP ...
//
// The device is persistent: when missiu dies, routes into it stay and swallow
// what policy protects. An orderly stop calls Persist(false) before Close.
package tap

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Values of Offload.GSOType (struct virtio_net_hdr).
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOTCPv6 = 4
	GSOUDPL4 = 5
	GSOECN   = 0x80 // flag beside a TCP type
)

// Offload is what the kernel left undone on a frame, or may do for us. All
// offsets count octets from the start of the Ethernet header. The zero value
// is an ordinary, finished frame.
type Offload struct {
	GSOType    uint8
	GSOSize    uint16 // payload octets of each segment
	HdrLen     uint16 // length of all headers; a hint only
	CsumStart  uint16 // where the checksummed area begins
	CsumOffset uint16 // of the checksum field, from CsumStart
	NeedsCsum  bool   // the field holds the pseudo-header's sum; the rest is to be added
}

// HeadroomMin is the least Frame.Off, in octets: the kernel's header for the
// metadata is put in front of the frame, over what is in Buf there.
const HeadroomMin = 10

// Frame is one Ethernet frame: Buf[Off:Off+Len].
type Frame struct {
	Buf     []byte
	Off     int
	Len     int
	Offload Offload
}

// Super says which super-frames the kernel gives on reading, or takes on writing.
type Super struct{ TCP4, TCP6, UDP bool }

func (s Super) String() string {
	var kinds []string
	for name, on := range map[string]bool{"tcp4": s.TCP4, "tcp6": s.TCP6, "udp": s.UDP} {
		if on {
			kinds = append(kinds, name)
		}
	}
	if len(kinds) == 0 {
		return "none"
	}
	slices.Sort(kinds)
	return strings.Join(kinds, " ")
}

// Has reports whether the kernel gives or takes a frame with these metadata: one of
// these kinds, or no super-frame.
func (s Super) Has(o Offload) bool {
	switch o.kind() {
	case kindTCP4:
		return s.TCP4
	case kindTCP6:
		return s.TCP6
	case kindUDP:
		return s.UDP
	}
	return o.GSOType == GSONone
}

// Without is s but for the kind of o.
func (s Super) Without(o Offload) Super {
	switch o.kind() {
	case kindTCP4:
		s.TCP4 = false
	case kindTCP6:
		s.TCP6 = false
	case kindUDP:
		s.UDP = false
	}
	return s
}

// Lost is what was dropped for want of time.
type Lost struct {
	Full uint64 // frames, by the kernel: its queue was full
	Shed uint64 // packets in super-frames, of UDP but for a few, by ReadBatch: see standing
}

// Device is a TAP or a TUN. It is safe for concurrent use.
type Device interface {
	Name() string
	Index() int
	MAC() net.HardwareAddr // of a TUN, what Options said
	// ReadBatch waits for a frame and takes what else is there, up to
	// len(fs) frames or a MiB, each into Buf[Off:] with Off as the caller set
	// it (at least HeadroomMin). Frames that do not fit are cut by the kernel.
	// The error of a closed device is os.ErrClosed; frames and an error never
	// come together.
	ReadBatch(fs []Frame) (int, error)
	// WriteBatch hands frames to the kernel in order. It stops at the first
	// that the kernel refuses, fs[n], and returns n and why; the caller goes on
	// with fs[n+1:] or not. A refused frame is EINVAL (malformed or wrong
	// metadata) or EIO (the device is down); octets before Off are overwritten.
	// Callers may write side by side: frames are whole, and in the order of
	// each caller. A super-frame that the kernel does not take is cut here.
	WriteBatch(fs []Frame) (int, error)
	// Queues are the queues, at least one; ReadBatch and WriteBatch are those of
	// the first. The kernel gives the packets of a flow to the queue on which
	// the last frame of that flow, in the other direction, was written; of a
	// flow that it has not seen, to one by a hash.
	Queues() []Queue
	// ReadSuper says which super-frames ReadBatch may return: those that
	// Options.ReadOffload asked for and the kernel has.
	ReadSuper() Super
	// Super says which super-frames WriteBatch passes on whole: what a test at
	// Open has found, less what was refused since. The others it cuts, and it
	// is cheaper not to make them.
	Super() Super
	// Cut counts super-frames that WriteBatch had to cut.
	Cut() uint64
	// Lost counts what never came out of ReadBatch.
	Lost() Lost
	MTU() int
	SetMTU(int) error
	// Persist decides whether the device outlives Close.
	Persist(bool) error
	Close() error
}

// Queue is one of a Device's queues: ReadBatch and WriteBatch have the contracts
// of Device's.
type Queue interface {
	ReadBatch(fs []Frame) (int, error)
	WriteBatch(fs []Frame) (int, error)
}

// Modes of Options.Offload.
const (
	OffloadAuto = "auto" // metadata with every frame
	OffloadNone = "none" // a plain TAP; what needs offload is finished in user space
)

// Options of Open.
type Options struct {
	TUN     bool   // a TUN instead of a TAP
	Name    string // "": the kernel chooses the next tapN or tunN
	For     string // the physical interface; kept in the device's alias for Find
	MAC     net.HardwareAddr
	MTU     int    // 0: as the kernel makes it
	Offload string // "" means OffloadAuto
	// ReadOffload asks the kernel for super-frames and unfinished checksums
	// on reading (TUNSETOFFLOAD). Without it every frame read is finished.
	ReadOffload bool
	Up          bool // bring it up
	// Queues is how many there are to be, up to MaxQueues; 0 means one. A kernel
	// that has none to give, or a device adopted with one, gives one.
	Queues int
	// Wait is how ReadBatch waits: linger.Adaptive, which "" means too, or linger.Poll.
	Wait string
}

// MaxQueues bounds Options.Queues; the kernel would give 256.
const MaxQueues = 64

// Errors that callers branch on; they come wrapped.
var (
	ErrInUse  = errors.New("another process has it open")
	ErrNotTAP = errors.New("exists and is another kind of device")
)

// GoneError says that somebody has deleted the device. errors.Is(err,
// unix.EBADFD) holds.
type GoneError struct{ Name string }

func (e *GoneError) Error() string {
	return e.Name + ": deleted, with the routes over it: packets they led here may leave in clear"
}

func (e *GoneError) Unwrap() error { return unix.EBADFD }

// PrivilegeError names what the process lacks.
type PrivilegeError struct {
	Op         string
	Capability string
	Err        error
}

func (e *PrivilegeError) Error() string {
	return fmt.Sprintf("%s: %v (needs %s)", e.Op, e.Err, e.Capability)
}

func (e *PrivilegeError) Unwrap() error { return e.Err }

// Package wire is the physical interface as missiu uses it beside the kernel's
// stack, which keeps the interface: packets that policy concerns are kept from
// the stack on arrival and handed to the data path; results of the data path
// leave by this interface whatever the routing table says of the TAP.
//
//	        NIC ---> AF_PACKET reader ---> ReadBatch
//	         |
//	nft ingress chain "missiu-<if>": drop what ReadBatch returns
//	         |
//	     kernel's stack ---> everything else; UDP 500 and 4500
//
// ESP in UDP comes and goes by a socket of its own (UDP). Other packets leave by
// AF_XDP or AF_PACKET where the kernel knows the next hop, else by raw sockets:
// see sender. Each fast path has a switch and another in its place (Fallbacks).
//
// Native ESP over a veth, both gateways and both ends on two processors, AF_XDP in copy
// mode that only transmits, and AF_PACKET past the queueing discipline, medians of
// three rounds of each in turn:
//
//	                               AF_XDP  AF_PACKET
//	TCP, one stream                2.4     1.3   Gbit/s
//	UDP 1400 B, at most 1 % lost   131     107   1000 packets a second
//	UDP 64 B, likewise             178     112
//	CPU of both daemons, TCP       6.1     11.5  us for a packet
//
// Kept from the stack are: ESP, AH and IPComp (RFC 4303, 4302, 3173) for an
// address of this host, and every packet whose source lies in the divert set.
// Of the latter, unfragmented UDP to port 500 or 4500 of this host (IKE must
// work before any SA exists) and neighbour discovery (RFC 4861: ICMPv6 133-137,
// hop limit 255) go the ordinary way. Reader and chain apply the same test, so that each
// packet takes exactly one of the two ways.
//
// Callers are the engine of pkg/datapath and the main of missiu. netlink,
// nftables, AF_PACKET and raw sockets stay behind this package.
package wire

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// Dir is where state lies that outlives a killed instance. Tests change it.
var Dir = "/run/missiu"

// ReadHeadroom is the least Packet.Off for ReadBatch, in octets: the Ethernet
// header of the packet and the kernel's metadata are put in front of it.
const ReadHeadroom = 14 + tap.HeadroomMin

// Packet is one IP packet: Buf[Off:Off+Len].
type Packet struct {
	Buf []byte
	Off int
	Len int
	// Offload is what the sending kernel left undone on a packet read; offsets
	// count from the Ethernet header 14 octets before Off, so it is valid for
	// a tap.Frame that begins there. WriteBatch finishes a checksum and
	// refuses what is to be segmented.
	Offload tap.Offload
}

// Conn is the packet side of the interface. One goroutine at a time may read;
// several may write.
type Conn interface {
	// ReadBatch waits for a packet that the stack was kept from and takes what
	// else is there, each into Buf[Off:] with Off as the caller set it (at
	// least ReadHeadroom). It may exchange the Buf of packets within ps. The
	// error of a closed Conn is os.ErrClosed, that of a lost interface a
	// *LinkError. Packets and an error never come together.
	ReadBatch(ps []Packet) (int, error)
	// WriteBatch sends IP packets with complete headers out of the interface,
	// in order. Next hops come from the kernel's routes over this interface.
	// It stops at the first packet that is refused, ps[n], and returns n and a
	// *SendError; the caller goes on with ps[n+1:] or not.
	WriteBatch(ps []Packet) (int, error)
}

// Datagram is one UDP payload: Buf[Off:Off+Len].
type Datagram struct {
	Buf    []byte
	Off    int
	Len    int
	Local  netip.AddrPort // on WriteBatch the source; the zero address lets the kernel choose
	Remote netip.AddrPort
	// TOS is the traffic class octet: DSCP and ECN.
	TOS uint8
	// Segment, if not 0, says that the payload is several datagrams of so many
	// octets, of which the last may be shorter (UDP_GRO, UDP_SEGMENT). On
	// writing there may be any number of them, of any length together, and
	// it is WriteBatch's business who cuts them.
	Segment int
	// DontFragment makes WriteBatch refuse with EMSGSIZE what exceeds the path
	// MTU. IKE messages leave it false.
	DontFragment bool
}

// UDPConn is port 4500 of the interface. One goroutine at a time may read;
// several may write.
type UDPConn interface {
	// ReadBatch and WriteBatch have the contracts of Conn's.
	ReadBatch(ds []Datagram) (int, error)
	WriteBatch(ds []Datagram) (int, error)
	Close() error
}

// Link is what is known of the interface at one moment.
type Link struct {
	Name  string
	Index int
	MAC   net.HardwareAddr
	MTU   int
	Up    bool
	Addrs []netip.Prefix // of the interface
}

// LinkError says that the interface is not what it was: it cannot be used any
// more. errors.Is(err, unix.ENODEV) holds.
type LinkError struct {
	Name   string
	Reason string // "deleted", "renamed to eth1"
}

func (e *LinkError) Error() string { return fmt.Sprintf("interface %s: %s", e.Name, e.Reason) }
func (e *LinkError) Unwrap() error { return unix.ENODEV }

// SendError is the kernel's refusal of one packet; Err is a syscall.Errno:
// EMSGSIZE (above the MTU of the route), ENOBUFS (queue full), EPERM (firewall),
// ENETUNREACH, EHOSTUNREACH, ENETDOWN, EINVAL (not an IP packet).
type SendError struct {
	Dst netip.Addr
	Err error
	// Lost is how many packets did not leave: 1, or so many segments of a
	// Datagram.
	Lost int
}

func (e *SendError) Error() string { return fmt.Sprintf("send to %v: %v", e.Dst, e.Err) }
func (e *SendError) Unwrap() error { return e.Err }

// ErrPortTaken is wrapped by OpenUDP when another process holds the port.
var ErrPortTaken = errors.New("another process holds the port")

// Stats are counters since Open.
type Stats struct {
	Read        uint64 // packets returned by ReadBatch
	Passed      uint64 // packets seen that are the kernel's
	Malformed   uint64 // kept from the stack, but not an IP packet
	Truncated   uint64 // longer than the caller's buffer
	KernelDrops uint64 // lost for want of socket buffer
	Sent        uint64
	SentXDP     uint64 // of Sent, by AF_XDP
	SentPacket  uint64 // by AF_PACKET; the rest by raw sockets
	SendTooBig  uint64 // EMSGSIZE
	SendNoBufs  uint64 // ENOBUFS, EAGAIN
	SendDenied  uint64 // EPERM, EACCES
	SendOther   uint64
	TooBig      uint64 // ICMP errors believed
	TooBigOdd   uint64 // ICMP errors about packets that are not ours, or absurd
}

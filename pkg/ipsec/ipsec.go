// Package ipsec holds the nouns of RFC 4301 as plain values: what the daemons,
// the PF_KEY socket and the configuration languages talk about. It computes
// nothing and knows no wire format. Addresses are netip values, never
// 4-in-6 mapped; ports, SPIs and counters are plain numbers in host order.
package ipsec

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
)

// SPI is the Security Parameters Index of an ESP or AH SA, as a number
// (its big-endian octets stand on the wire). 0 and 1-255 are reserved
// (RFC 4303, 2.1). The 64-bit SPIs of IKE are another type.
type SPI uint32

func (s SPI) String() string { return fmt.Sprintf("0x%08x", uint32(s)) }

// MinSPI is the smallest SPI that an SA may have.
const MinSPI SPI = 256

// Protocol is the IP protocol number of a security protocol.
type Protocol uint8

// Security protocols.
const (
	ESP    Protocol = 50
	AH     Protocol = 51
	IPComp Protocol = 108
)

func (p Protocol) String() string {
	switch p {
	case ESP:
		return "esp"
	case AH:
		return "ah"
	case IPComp:
		return "ipcomp"
	}
	return fmt.Sprintf("Protocol(%d)", uint8(p))
}

// Mode is the mode of an SA. Numbers are PF_KEY's.
type Mode uint8

// Modes.
const (
	ModeAny   Mode = 0
	Transport Mode = 1
	Tunnel    Mode = 2
)

func (m Mode) String() string {
	switch m {
	case ModeAny:
		return "any"
	case Transport:
		return "transport"
	case Tunnel:
		return "tunnel"
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

// Direction of a policy. Numbers are PF_KEY's.
type Direction uint8

// Directions: In for packets to this host, Out for what is sent, Fwd for
// packets that are forwarded after decapsulation.
const (
	In  Direction = 1
	Out Direction = 2
	Fwd Direction = 3
)

func (d Direction) String() string {
	switch d {
	case In:
		return "in"
	case Out:
		return "out"
	case Fwd:
		return "fwd"
	}
	return fmt.Sprintf("Direction(%d)", uint8(d))
}

// ReqID ties SAs to the policy entry they serve; 0 is none.
type ReqID uint32

// SAID identifies an SA (RFC 4301, 4.1): protocol, destination, SPI.
type SAID struct {
	Proto Protocol
	Dst   netip.Addr
	SPI   SPI
}

func (id SAID) String() string { return fmt.Sprintf("%v/%v/%v", id.Proto, id.Dst, id.SPI) }

// Lifetime is a set of limits; zero fields do not limit. The first reached counts.
type Lifetime struct {
	Packets uint64
	Bytes   uint64
	AddTime time.Duration // since creation; whole seconds on PF_KEY
	UseTime time.Duration // since first use
}

// IsZero reports whether l limits nothing.
func (l Lifetime) IsZero() bool { return l == Lifetime{} }

// Idle is how long an SA may go unused; zero fields do not limit. One that does is
// dying, and works on, until it is used again.
type Idle struct {
	AddTime time.Duration // never used since creation; whole seconds on PF_KEY
	UseTime time.Duration // since last use
}

// Encap says that ESP travels in UDP (RFC 3948), with the outer ports in the
// SA's own direction: of an inbound SA SPort is the peer's.
type Encap struct {
	SPort, DPort uint16
	OA           netip.Addr // the peer's original address, invalid if unknown
}

// TrafficSelector is one element of an SA's selector list (RFC 7296, 3.13.1).
type TrafficSelector struct {
	Proto          uint8 // upper protocol, 0 any
	Start, End     netip.Addr
	PortLo, PortHi uint16 // 0..65535 any; ICMP: type<<8|code; OPAQUE is 65535..0
}

// Contains reports whether address, protocol and port lie in t. A packet
// without known port (hasPort false) only matches a selector of any port.
func (t TrafficSelector) Contains(a netip.Addr, proto uint8, port uint16, hasPort bool) bool {
	if t.Proto != 0 && t.Proto != proto {
		return false
	}
	if a.BitLen() != t.Start.BitLen() || a.Less(t.Start) || t.End.Less(a) {
		return false
	}
	if t.PortLo == 0 && t.PortHi == 65535 {
		return true
	}
	if !hasPort {
		return t.PortLo == 65535 && t.PortHi == 0
	}
	return t.PortLo <= port && port <= t.PortHi
}

func (t TrafficSelector) String() string {
	s := t.Start.String()
	if t.End != t.Start {
		s += "-" + t.End.String()
	}
	if t.Proto != 0 {
		s += fmt.Sprintf("[%d", t.Proto)
		if t.PortLo != 0 || t.PortHi != 65535 {
			s += fmt.Sprintf("/%d-%d", t.PortLo, t.PortHi)
		}
		s += "]"
	}
	return s
}

// Queue numbers the queues of the TAP, from 1; 0 stands for all of them.
type Queue uint16

// TFCPathMTU has packets padded to what the path takes.
const TFCPathMTU = 65535

// SAParams is everything that makes an SA. Whoever holds one with keys calls
// Wipe when done with it.
type SAParams struct {
	SAID
	Src     netip.Addr
	Mode    Mode // never ModeAny in the SAD
	ReqID   ReqID
	Encr    alg.Encr // EncrNone for AH
	EncrKey Key      // cipher key, then salt
	Auth    alg.Integ
	AuthKey Key
	// Unauthenticated is the operator's word that an ESP SA with encryption and
	// IntegNone is meant; without it there is none.
	Unauthenticated bool
	// ReplayWindow is in packets; 0 turns the check off.
	ReplayWindow uint32
	ESN          bool
	// AggFrag: the payload is an AGGFRAG_PAYLOAD (RFC 9347), several packets or
	// parts of packets. ESP in tunnel mode only, and not within other transforms.
	AggFrag bool
	// TFC is the length in octets that a shorter packet is padded to before it is
	// encrypted (RFC 4303, 2.7), or TFCPathMTU; 0: no such padding. Outbound ESP in
	// tunnel mode only, outside AGGFRAG; within other transforms it does nothing.
	TFC uint16
	// CPI, of ESP and AH, has payloads compressed before they are protected, where
	// that makes them shorter: what is protected then is an IPComp header with this
	// CPI and DEFLATE behind it (RFC 3173), around the whole packet in tunnel mode.
	// Inbound such payloads are taken besides others. Of several SAs around each
	// other the innermost one's counts outbound. 0: no compression. Not with
	// AggFrag or TFC.
	CPI uint16
	// Queue is the one whose packets alone the SA carries outbound, and whose
	// worker is to have it inbound; 0: any.
	Queue Queue
	// PerQueue, of an SA for any queue: the peer takes further SAs beside it for
	// single ones (RFC 9611).
	PerQueue bool
	// LastSeq is the last sequence number that counts as used: a sender goes on
	// behind it, a receiver takes none up to it. 0 for a fresh SA.
	LastSeq    uint64
	Hard, Soft Lifetime
	Idle       Idle
	Encap      *Encap // nil: protocol 50 directly over IP
	// Home are the ends of the tunnel by which policy knows the SA, where it has
	// moved away from them (RFC 4555); nil: its own addresses.
	Home *Ends
	// SrcTS and DstTS restrict inner packets beyond the policy, in the SA's
	// direction; empty lists do not restrict.
	SrcTS, DstTS []TrafficSelector
}

// Ends are the end points of a tunnel, in the SA's direction.
type Ends struct{ Src, Dst netip.Addr }

// Ends are those by which policy knows the SA.
func (p *SAParams) Ends() Ends {
	if p.Home != nil {
		return *p.Home
	}
	return Ends{p.Src, p.Dst}
}

// Wipe overwrites the keys.
func (p *SAParams) Wipe() {
	p.EncrKey.Wipe()
	p.AuthKey.Wipe()
}

// Selector picks packets for a policy. Src and Dst are of one family. Ports
// are 0 for any; for ICMP, ICMPv6 SrcPort holds the type and DstPort the code,
// each plus one so that 0 stays "any".
type Selector struct {
	Src, Dst         netip.Prefix
	Proto            uint8 // upper protocol, 0 any
	SrcPort, DstPort uint16
}

// Reverse returns s with source and destination exchanged (ICMP type and code stay).
func (s Selector) Reverse() Selector {
	s.Src, s.Dst = s.Dst, s.Src
	if s.Proto != 1 && s.Proto != 58 {
		s.SrcPort, s.DstPort = s.DstPort, s.SrcPort
	}
	return s
}

func (s Selector) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v", s.Src)
	if s.SrcPort != 0 {
		fmt.Fprintf(&b, "[%d]", s.SrcPort)
	}
	fmt.Fprintf(&b, " -> %v", s.Dst)
	if s.DstPort != 0 {
		fmt.Fprintf(&b, "[%d]", s.DstPort)
	}
	if s.Proto != 0 {
		fmt.Fprintf(&b, " proto %d", s.Proto)
	}
	return b.String()
}

// Action is what a policy does with a packet (RFC 4301, 4.4.1). Numbers are PF_KEY's.
type Action uint8

// Actions.
const (
	Discard Action = 0
	Bypass  Action = 1
	Protect Action = 2
)

func (a Action) String() string {
	switch a {
	case Discard:
		return "discard"
	case Bypass:
		return "bypass"
	case Protect:
		return "protect"
	}
	return fmt.Sprintf("Action(%d)", uint8(a))
}

// Level says how much a Request is wanted. Numbers are PF_KEY's.
type Level uint8

// Levels: Use passes clear text when there is no SA; Require takes any SA of
// the right addresses, protocol and mode; Unique only SAs of its ReqID.
const (
	LevelDefault Level = 0
	LevelUse     Level = 1
	LevelRequire Level = 2
	LevelUnique  Level = 3
)

// Request is one transform of a Protect policy. One of tunnel mode whose Src or
// Dst is unspecified (0.0.0.0 or ::) is a template: it takes SAs whatever their
// address at that end, of those made for it (its ReqID) the ones whose traffic
// selectors hold the packet.
type Request struct {
	Proto    Protocol
	Mode     Mode
	Level    Level
	ReqID    ReqID
	Src, Dst netip.Addr // tunnel end points; invalid in transport mode
	// Comp is the level of IPComp inside, of a request that Packed made; else 0.
	Comp Level
}

// Packed is the one request of ESP or AH, with IPComp as a property of its SAs
// (SAParams.CPI), that makes the same packets as two of IPComp and of ESP or AH in
// transport mode around it; nil if rs are not those.
func Packed(rs []Request) *Request {
	if len(rs) != 2 || rs[0].Proto != IPComp || rs[1].Proto != ESP && rs[1].Proto != AH || rs[1].Mode != Transport || rs[0].Mode == ModeAny {
		return nil
	}
	r := rs[1]
	r.Mode, r.Src, r.Dst, r.Comp = rs[0].Mode, rs[0].Src, rs[0].Dst, rs[0].Level
	if r.Comp == LevelDefault {
		r.Comp = LevelRequire
	}
	return &r
}

// Open reports whether an end point of a tunnel is left to the SA.
func Open(end netip.Addr) bool { return end.IsUnspecified() }

// Template reports whether an end of r is open.
func (r *Request) Template() bool { return r.Mode == Tunnel && (Open(r.Src) || Open(r.Dst)) }

// AnyPeer reports whether the far end of an outbound r is open, so that there is
// nobody whom one could ask for an SA.
func (r *Request) AnyPeer() bool { return r.Mode == Tunnel && Open(r.Dst) }

// Ends reports whether an SA from src to dst is between the end points of r,
// which is of tunnel mode.
func (r *Request) Ends(src, dst netip.Addr) bool {
	return (r.Src == src || Open(r.Src)) && (r.Dst == dst || Open(r.Dst))
}

// Shape says which transforms a Proposal consists of. Numbers are those of
// keysock's private extension.
type Shape uint8

// Shapes: ESP alone, AH alone, AH with ESP inside.
const (
	ShapeESP Shape = iota
	ShapeAH
	ShapeAHESP
)

func (s Shape) String() string {
	switch s {
	case ShapeESP:
		return "esp"
	case ShapeAH:
		return "ah"
	case ShapeAHESP:
		return "ah+esp"
	}
	return fmt.Sprintf("Shape(%d)", uint8(s))
}

// Has reports whether p is one of the transforms.
func (s Shape) Has(p Protocol) bool {
	return p == ESP && s != ShapeAH || p == AH && s != ShapeESP
}

// Proposal is one acceptable combination of algorithms, best first in a list.
// EncrNone accepts any cipher that encrypts. With a cipher that is not an AEAD,
// IntegNone in Auth accepts any integrity algorithm and never means "without";
// in AH it accepts any as well.
type Proposal struct {
	Shape                    Shape
	Encr                     alg.Encr // of ESP; these are zero without it
	EncrMinBits, EncrMaxBits uint16   // cipher key without salt; 0: any size the cipher has
	Auth                     alg.Integ
	AH                       alg.Integ // of AH; zero without it
	Hard, Soft               Lifetime  // wanted of the SA
}

// Part is p as far as it concerns the SA of one protocol, false if it has none.
func (p Proposal) Part(proto Protocol) (Proposal, bool) {
	switch {
	case !p.Shape.Has(proto):
		return Proposal{}, false
	case proto == AH:
		return Proposal{Shape: ShapeAH, AH: p.AH, Hard: p.Hard, Soft: p.Soft}, true
	}
	p.Shape, p.AH = ShapeESP, alg.IntegNone
	return p, true
}

// Parts is Part of each of ps that has one.
func Parts(ps []Proposal, proto Protocol) []Proposal {
	var l []Proposal
	for _, p := range ps {
		if q, ok := p.Part(proto); ok {
			l = append(l, q)
		}
	}
	return l
}

// Policy is one SPD entry.
type Policy struct {
	ID       uint32 // given by the SPD
	Dir      Direction
	Sel      Selector
	Action   Action
	Priority uint32    // smaller is stronger; equal ones in order of insertion
	Requests []Request // innermost first; only with Protect
	// Proposals are the alternatives for the ESP request and the AH request,
	// best first; empty leaves the choice of algorithms to the key daemon. A
	// packet has the transforms of one alternative, so if Choice reports true
	// not every request counts for every packet.
	Proposals []Proposal
	Flags     PolicyFlags
	Hard      Lifetime // of the policy itself: AddTime, UseTime
}

// Choice reports whether the alternatives of p differ in more than the algorithms
// of a single transform: then an SA of the policy's reqid may serve one of them
// and not another, and only a whole alternative counts.
func (p *Policy) Choice() bool {
	for i := range p.Proposals {
		if p.Proposals[i].Shape != p.Proposals[0].Shape || i > 0 && p.Proposals[i].Shape == ShapeAHESP {
			return true
		}
	}
	return false
}

// PolicyFlags say more about a Protect policy. Numbers are those of keysock's
// private extension.
type PolicyFlags uint32

// Flags of policies.
const (
	// PolicyClear: packets may be in clear as well. Inbound ones are accepted,
	// outbound ones go while there is no SA.
	PolicyClear PolicyFlags = 1 << iota
	// PolicyPerFlow: every flow has a pair of SAs of its own, which hold
	// nothing else.
	PolicyPerFlow
	// PolicyManual: besides the SAs of the policy's reqid those without reqid
	// serve, if their algorithms are among Proposals: what an operator keys by
	// hand names no policy.
	PolicyManual
	// PolicyInit: key daemons negotiate SAs without waiting for a packet.
	PolicyInit
)

// Flow is what a packet looks like to a policy.
type Flow struct {
	Src, Dst         netip.Addr
	Proto            uint8  // upper protocol
	SrcPort, DstPort uint16 // 0 if the packet shows none; ICMP: type and code
}

func (f Flow) String() string {
	return fmt.Sprintf("%v[%d] -> %v[%d] proto %d", f.Src, f.SrcPort, f.Dst, f.DstPort, f.Proto)
}

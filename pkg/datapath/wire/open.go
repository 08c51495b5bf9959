package wire

import (
	"errors"
	"net/netip"
)

// Wire is an open interface. It implements Conn.
type Wire struct{}

var errTODO = errors.New("wire: not built yet")

// Open takes the interface over: chain, reader, senders. A chain that a killed
// instance left is replaced in one step, with its divert set kept until the
// first SetDivert.
func Open(ifname string) (*Wire, error) { return nil, errTODO }

func (w *Wire) ReadBatch(ps []Packet) (int, error)  { return 0, errTODO }
func (w *Wire) WriteBatch(ps []Packet) (int, error) { return 0, errTODO }

// Link returns the present state of the interface.
func (w *Wire) Link() Link { return Link{} }

// Changes delivers the state of the interface after each change; of several
// that nobody took only the last. It is closed when the interface is lost
// (Err says why) or w is closed.
func (w *Wire) Changes() <-chan Link { return nil }

// Err returns the *LinkError once the interface is lost.
func (w *Wire) Err() error { return nil }

// LocalAddrs returns all addresses of this host.
func (w *Wire) LocalAddrs() []netip.Addr { return nil }

// IsLocal reports whether a is an address of this host. It does not allocate.
func (w *Wire) IsLocal(a netip.Addr) bool { return false }

// SetDivert replaces the divert set. Between the old and the new set packets
// of sources in only one of them may be lost, but none reaches the stack that
// either the old or the new set keeps from it during the change.
func (w *Wire) SetDivert(v4, v6 []netip.Prefix) error { return errTODO }

// PathMTU returns the length of the largest IP packet, in octets, that reaches
// dst as far as is known. The first question about a destination costs a
// system call.
func (w *Wire) PathMTU(dst netip.Addr) int { return 0 }

// SetPathMTU notes a path MTU that was learnt; it is forgotten after ten
// minutes (RFC 1191, 6.3; RFC 8201, 4). Values below 576 (IPv4: 68 is legal
// but only attackers use it) or 1280 (IPv6) are raised to that.
func (w *Wire) SetPathMTU(dst netip.Addr, mtu int) {}

// VerifyTooBig sets the judge of ICMP errors that quote our ESP, AH or UDP
// 4500: only if it returns true is the path MTU lowered (RFC 4301, 8.2.1). nil:
// all that quote an address of this host as source. It is called from ReadBatch.
func (w *Wire) VerifyTooBig(judge func(TooBig) bool) {}

// TooBig is what an ICMP "fragmentation needed" or ICMPv6 "packet too big"
// says about a packet of ours that it quotes.
type TooBig struct {
	MTU      int
	Src, Dst netip.Addr // of the quoted packet
	Proto    uint8      // 50, 51 or 17
	SPI      uint32     // of ESP, AH, or ESP in UDP; 0 if IKE or not quoted
	SrcPort  uint16     // UDP
	DstPort  uint16
}

// Stats returns the counters.
func (w *Wire) Stats() Stats { return Stats{} }

// Close gives the interface back: chain deleted, sysctls as before.
func (w *Wire) Close() error { return nil }

// Cleanup removes what a killed instance for ifname left: chain, TAP, sysctls,
// files. It reports whether there was anything.
func Cleanup(ifname string) (bool, error) { return false, errTODO }

// UDP is port 4500 on the interface. It implements UDPConn.
type UDP struct{}

// UDPOptions of OpenUDP.
type UDPOptions struct {
	Port uint16 // 0: 4500
	GRO  bool   // the caller understands Datagram.Segment on reading
}

// OpenUDP binds the port, for packets that arrive at the interface for any of
// this host's addresses. If another process has it, the error wraps ErrPortTaken.
func (w *Wire) OpenUDP(o UDPOptions) (*UDP, error) { return nil, errTODO }

func (u *UDP) ReadBatch(ds []Datagram) (int, error)  { return 0, errTODO }
func (u *UDP) WriteBatch(ds []Datagram) (int, error) { return 0, errTODO }
func (u *UDP) Close() error                          { return nil }

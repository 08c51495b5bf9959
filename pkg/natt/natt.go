// Package natt carries what belongs to IKE on UDP port 4500 between missiu,
// which owns the port, and ike (RFC 3948, 2.2 and 2.3): IKE messages without
// the non-ESP marker in both directions, and NAT keepalives to be sent. The
// socket is /run/missiu/<if>.natt, AF_UNIX SOCK_SEQPACKET, mode 0600, with the
// peer's credentials checked. missiu is the server, ike the client; both may
// import this package, which imports nothing of ours.
//
// One packet on the socket is one message:
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+---------------+---------------+-------------------------------+
//	|  version = 1  |  family 4, 6  |           reserved = 0        |
//	+---------------+---------------+-------------------------------+
//	|   local port, big-endian      |   remote port, big-endian     |
//	+-------------------------------+-------------------------------+
//	|   local address, 16 octets; IPv4 in the first four, then 0    |
//	+---------------------------------------------------------------+
//	|   remote address, likewise                                    |
//	+---------------------------------------------------------------+
//	|   payload: an IKE message of at least 28 octets, or one 0xff  |
//	+---------------------------------------------------------------+
package natt

import (
	"encoding/binary"
	"net/netip"
	"path/filepath"
)

// Dir is where the sockets are. Tests change it.
var Dir = "/run/missiu"

// Path returns the socket of the instance on an interface.
func Path(ifname string) string { return filepath.Join(Dir, ifname+".natt") }

// Message is what one packet carries. Payload is an IKE message without the
// non-ESP marker, or the single octet 0xff: a keepalive.
type Message struct {
	Local, Remote netip.AddrPort
	Payload       []byte
}

const (
	version   = 1
	headerLen = 40
	minIKE    = 28 // the IKE header
)

// MaxMessage is the length of the longest packet on the socket, in octets.
const MaxMessage = headerLen + 65535

// FormatError says what is wrong with a message.
type FormatError struct{ Reason string }

func (e *FormatError) Error() string { return "natt: " + e.Reason }

// Append appends the packet of m to b; the error is a *FormatError.
func (m *Message) Append(b []byte) ([]byte, error) {
	l, r := m.Local.Addr(), m.Remote.Addr()
	switch {
	case !l.IsValid() || !r.IsValid() || l.Is4() != r.Is4() || l.Is4In6() || r.Is4In6():
		return b, &FormatError{"addresses of two families, or none"}
	case l.Zone() != "" || r.Zone() != "":
		return b, &FormatError{"address with a zone"}
	case m.Local.Port() == 0 || m.Remote.Port() == 0:
		return b, &FormatError{"port 0"}
	}
	if err := checkPayload(m.Payload); err != nil {
		return b, err
	}
	family := byte(6)
	if l.Is4() {
		family = 4
	}
	b = append(b, version, family, 0, 0)
	b = binary.BigEndian.AppendUint16(b, m.Local.Port())
	b = binary.BigEndian.AppendUint16(b, m.Remote.Port())
	for _, a := range []netip.Addr{l, r} {
		var x [16]byte
		copy(x[:], a.AsSlice())
		b = append(b, x[:]...)
	}
	return append(b, m.Payload...), nil
}

// Parse takes a packet apart; the payload lies in b. The error is a *FormatError.
func Parse(b []byte) (Message, error) {
	var m Message
	if len(b) < headerLen {
		return m, &FormatError{"shorter than its header"}
	}
	if b[0] != version || b[2] != 0 || b[3] != 0 {
		return m, &FormatError{"unknown version"}
	}
	l, err := addr(b[1], b[8:24])
	if err != nil {
		return m, err
	}
	r, err := addr(b[1], b[24:40])
	if err != nil {
		return m, err
	}
	m.Local = netip.AddrPortFrom(l, binary.BigEndian.Uint16(b[4:]))
	m.Remote = netip.AddrPortFrom(r, binary.BigEndian.Uint16(b[6:]))
	if m.Local.Port() == 0 || m.Remote.Port() == 0 {
		return Message{}, &FormatError{"port 0"}
	}
	if err := checkPayload(b[headerLen:]); err != nil {
		return Message{}, err
	}
	m.Payload = b[headerLen:]
	return m, nil
}

func addr(family byte, b []byte) (netip.Addr, error) {
	switch family {
	case 4:
		if [12]byte(b[4:16]) != [12]byte{} {
			return netip.Addr{}, &FormatError{"octets behind an IPv4 address"}
		}
		return netip.AddrFrom4([4]byte(b[:4])), nil
	case 6:
		a := netip.AddrFrom16([16]byte(b))
		if a.Is4In6() {
			return netip.Addr{}, &FormatError{"IPv4 address in IPv6 form"}
		}
		return a, nil
	}
	return netip.Addr{}, &FormatError{"unknown address family"}
}

func checkPayload(p []byte) error {
	switch {
	case len(p) == 1 && p[0] == 0xff:
		return nil
	case len(p) < minIKE:
		return &FormatError{"payload is neither an IKE message nor a keepalive"}
	case len(p) > MaxMessage-headerLen:
		return &FormatError{"payload too long"}
	}
	return nil
}

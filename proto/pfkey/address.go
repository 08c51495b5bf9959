package pfkey

import (
	"encoding/binary"
	"net/netip"
)

// Address is an ADDRESS or X_NAT_T_OA extension (RFC 2367, 2.3.3). The address
// has no zone; IPv4 in IPv6 stays as it came.
type Address struct {
	Proto     uint8 // upper protocol; policies: AnyProto or 0 is any
	PrefixLen uint8
	Addr      netip.AddrPort
}

func (a *Address) decode(b []byte) error {
	ap, n, err := parseSockaddr(b[8:])
	if err != nil {
		return err
	}
	if want := (8 + n + wordLen - 1) / wordLen * wordLen; len(b) != want {
		return invalid("%d octets, want %d", len(b), want)
	}
	if int(b[5]) > ap.Addr().BitLen() {
		return invalid("prefix length %d", b[5])
	}
	*a = Address{Proto: b[4], PrefixLen: b[5], Addr: ap}
	return nil
}

func (a *Address) append(b []byte) ([]byte, error) {
	if int(a.PrefixLen) > a.Addr.Addr().BitLen() {
		return b, invalid("prefix length %d of %v", a.PrefixLen, a.Addr)
	}
	return appendSockaddr(append(b, a.Proto, a.PrefixLen, 0, 0), a.Addr)
}

// parseSockaddr reads Linux's sockaddr_in or sockaddr_in6 at the front of b and
// returns its length.
func parseSockaddr(b []byte) (netip.AddrPort, int, error) {
	if len(b) < 2 {
		return netip.AddrPort{}, 0, invalid("no address")
	}
	switch f := host.Uint16(b); {
	case f == familyIPv4 && len(b) >= lenSockaddrIn:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:])), binary.BigEndian.Uint16(b[2:])), lenSockaddrIn, nil
	case f == familyIPv6 && len(b) >= lenSockaddrIn6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:])), binary.BigEndian.Uint16(b[2:])), lenSockaddrIn6, nil
	default:
		return netip.AddrPort{}, 0, invalid("address of family %d in %d octets", f, len(b))
	}
}

func appendSockaddr(b []byte, ap netip.AddrPort) ([]byte, error) {
	switch a := ap.Addr(); {
	case a.Is4():
		b = host.AppendUint16(b, familyIPv4)
		b = binary.BigEndian.AppendUint16(b, ap.Port())
		b = append(b, a.AsSlice()...)
		return append(b, make([]byte, 8)...), nil
	case a.Is6():
		b = host.AppendUint16(b, familyIPv6)
		b = binary.BigEndian.AppendUint16(b, ap.Port())
		b = append(b, 0, 0, 0, 0)
		b = append(b, a.AsSlice()...)
		return append(b, 0, 0, 0, 0), nil
	}
	return b, invalid("no address")
}

// KMAddress is the X_KMADDRESS extension: addresses of the key managers.
type KMAddress struct{ Local, Remote netip.AddrPort }

func (k *KMAddress) decode(b []byte) error {
	l, r, n, err := parsePair(b[8:])
	if err != nil {
		return err
	}
	if want := (8 + n + wordLen - 1) / wordLen * wordLen; len(b) != want {
		return invalid("%d octets, want %d", len(b), want)
	}
	*k = KMAddress{l, r}
	return nil
}

func (k *KMAddress) append(b []byte) ([]byte, error) {
	return appendPair(append(b, 0, 0, 0, 0), k.Local, k.Remote)
}

// parsePair reads two sockaddrs of one family, without padding between.
func parsePair(b []byte) (x, y netip.AddrPort, n int, err error) {
	x, n, err = parseSockaddr(b)
	if err != nil {
		return x, y, 0, err
	}
	y, m, err := parseSockaddr(b[n:])
	if err != nil {
		return x, y, 0, err
	}
	if n != m {
		return x, y, 0, invalid("addresses of two families")
	}
	return x, y, n + m, nil
}

func appendPair(b []byte, x, y netip.AddrPort) ([]byte, error) {
	if x.Addr().BitLen() != y.Addr().BitLen() {
		return b, invalid("addresses of two families")
	}
	b, err := appendSockaddr(b, x)
	if err != nil {
		return b, err
	}
	return appendSockaddr(b, y)
}

// Filter is the X_FILTER extension of a DUMP: addresses of family Family, from
// the front of the arrays, with prefixes.
type Filter struct {
	Src, Dst             [16]byte
	Family               uint16
	SrcPrefix, DstPrefix uint8
}

func (f *Filter) decode(b []byte) error {
	*f = Filter{[16]byte(b[4:]), [16]byte(b[20:]), host.Uint16(b[36:]), b[38], b[39]}
	if f.SrcPrefix > 128 || f.DstPrefix > 128 {
		return invalid("prefix lengths %d, %d", f.SrcPrefix, f.DstPrefix)
	}
	return nil
}

func (f *Filter) append(b []byte) ([]byte, error) {
	b = append(b, f.Src[:]...)
	b = append(b, f.Dst[:]...)
	return append(host.AppendUint16(b, f.Family), f.SrcPrefix, f.DstPrefix), nil
}

// Match reports whether an SA between src and dst passes the filter. A family
// of 0 matches every address, as does a prefix of 0.
func (f *Filter) Match(src, dst netip.Addr) bool {
	return f.matchOne(f.Src, f.SrcPrefix, src) && f.matchOne(f.Dst, f.DstPrefix, dst)
}

func (f *Filter) matchOne(raw [16]byte, bits uint8, a netip.Addr) bool {
	if f.Family == 0 || bits == 0 {
		return true
	}
	want := netip.AddrFrom16(raw)
	if f.Family == familyIPv4 {
		want = netip.AddrFrom4([4]byte(raw[:4]))
	}
	p, err := want.Prefix(int(bits))
	return err == nil && p.Contains(a)
}

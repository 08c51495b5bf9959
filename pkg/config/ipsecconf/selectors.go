package ipsecconf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/ipsec"
)

// selectors reads what the pattern says, in the order of the text.
func (m *entryMeaning) selectors() {
	m.tunnel()
	if p, ok := m.sel["dir"]; ok && dirNames[p.Value.Text] == 0 {
		m.badValue(p, "want in, out, both, mirrored, in_mirrored or out_mirrored")
	}
	if p, ok := m.sel["ulp"]; ok {
		if m.proto, ok = m.protocol(p.Value.Text); !ok {
			m.badValue(p, "want a protocol such as tcp, udp, icmp or ipv6-icmp, or a number from 0 to 254")
		}
	}
	for _, side := range []struct {
		addrs      *[]netip.Prefix
		port       *uint16
		keys       []string
		mask, pkey string
	}{{&m.src, &m.sport, []string{"laddr", "saddr"}, "smask", "sport"}, {&m.dst, &m.dport, []string{"raddr", "daddr"}, "dmask", "dport"}} {
		for _, k := range side.keys {
			if p, ok := m.sel[k]; ok {
				*side.addrs = m.addresses(p, side.mask)
			}
		}
		if p, ok := m.sel[side.mask]; ok && m.sel[side.keys[1]].Key.Text == "" {
			m.missing(p.Key, "%s: %s missing", side.mask, side.keys[1])
		}
		for _, k := range []string{side.pkey, map[string]string{"sport": "lport", "dport": "rport"}[side.pkey]} {
			if p, ok := m.sel[k]; ok {
				*side.port = m.port(p)
			}
		}
	}
	m.icmp()
}

func (m *meaning) protocol(s string) (uint8, bool) {
	if n, ok := number(s, 254); ok {
		return uint8(n), true
	}
	n, ok := protocols[strings.ToLower(s)]
	return n, ok
}

func (m *entryMeaning) port(p Param) uint16 {
	const want = "want a port from 0 to 65535 or the name of a service"
	s := p.Value.Text
	if !hasPorts(m.proto) {
		m.errorf(p.Key, "%s: protocol %d has no ports", p.Key.Text, m.proto)
		return 0
	}
	if n, ok := number(s, 65535); ok {
		return uint16(n)
	}
	if c, ok := m.consts[s]; ok {
		if c.addr.IsValid() || c.value > 65535 {
			m.badValue(p, "%s, but the constant is %s", want, c.text)
			return 0
		}
		return uint16(c.value)
	}
	if n, ok := services[strings.ToLower(s)]; ok {
		return n
	}
	if c := s[0]; m.opt.LookupPort != nil && (c < '0' || c > '9') {
		if n, err := m.opt.LookupPort(s); err == nil && n != 0 {
			return n
		}
	}
	m.badValue(p, want)
	return 0
}

const wantAddr = "want an address, prefix, range, host or network name"

type hostResult struct {
	addrs []netip.Addr
	err   error
	net   int // length of the prefix, if it is a network's name; 0: a host's
}

// addresses reads an address, with the mask of the same side if it has one.
func (m *entryMeaning) addresses(p Param, maskKey string) []netip.Prefix {
	s := p.Value.Text
	if from, to, ok := strings.Cut(s, "-"); ok {
		a, err1 := netip.ParseAddr(from)
		b, err2 := netip.ParseAddr(to)
		if err1 == nil || err2 == nil {
			if mask, ok := m.sel[maskKey]; ok {
				m.errorf(mask.Key, "%s: not with a range", maskKey)
			}
			return m.addrRange(p, a, b, err1 == nil && err2 == nil)
		}
	}
	host, length, prefixed := strings.Cut(s, "/")
	addrs := m.hostAddrs(p, host)
	if len(addrs) == 0 {
		return nil
	}
	if prefixed && len(addrs) > 1 {
		m.badValue(p, "no prefix length behind a name of several addresses")
		return nil
	}
	n := addrs[0].BitLen()
	if net := m.hosts[host].net; net > 0 {
		n = net
	}
	if prefixed {
		v, err := strconv.Atoi(length)
		switch {
		case err != nil || v < 0 || length[0] == '+' || len(length) > 1 && length[0] == '0':
			m.badValue(p, wantAddr)
			return nil
		case v > n:
			m.badValue(p, "prefix length above %d", n)
			return nil
		}
		n = v
	}
	if mask, ok := m.sel[maskKey]; ok {
		v, ok := maskBits(mask.Value.Text)
		switch {
		case prefixed:
			m.errorf(mask.Key, "%s: not with a prefix length", maskKey)
			return nil
		case !addrs[0].Is4() || len(addrs) > 1:
			m.errorf(mask.Key, "%s: only with one IPv4 address", maskKey)
			return nil
		case !ok:
			m.badValue(mask, "want a mask such as 255.255.255.0 or 0xffffff00")
			return nil
		}
		n = v
	}
	var ps []netip.Prefix
	if _, name := m.hosts[host]; name && len(addrs) > 1 {
		m.l.Warnf(p.Value.Pos, "%s %s: the name has %d addresses; the entry stands for all, NanoSec takes the first", p.Key.Text, lexer.Shown(host), len(addrs))
	}
	for _, a := range addrs {
		if len(addrs) > 1 {
			n = a.BitLen()
		}
		ps = append(ps, netip.PrefixFrom(a, n).Masked())
	}
	return ps
}

// hostAddrs reads an address or a name.
func (m *entryMeaning) hostAddrs(p Param, host string) []netip.Addr {
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Zone() != "" || a.Is4In6() {
			m.badValue(p, "want an address without zone and not IPv4-mapped")
			return nil
		}
		return []netip.Addr{a}
	}
	if c, ok := m.consts[host]; ok {
		if !c.addr.IsValid() {
			m.badValue(p, "%s, but the constant is a number", wantAddr)
			return nil
		}
		return []netip.Addr{c.addr}
	}
	if !HostName(host) {
		m.badValue(p, wantAddr)
		return nil
	}
	r, ok := m.hosts[host]
	if !ok {
		switch {
		case host == "localhost":
			r.addrs = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
		case m.opt.LookupHost == nil:
			r.err = errors.New("names are not looked up")
		case m.lookups > maxLookups:
			r.err = errSlow
		default:
			start := time.Now()
			r.addrs, r.err = m.opt.LookupHost(host)
			r.addrs = distinct(r.addrs)
			if len(r.addrs) == 0 && m.opt.LookupNet != nil {
				if p, err := m.opt.LookupNet(host); err == nil && p.Bits() > 0 {
					r = hostResult{addrs: []netip.Addr{p.Addr()}, net: p.Bits()}
				}
			}
			m.lookups += time.Since(start)
		}
		m.hosts[host] = r
	}
	if errors.Is(r.err, errSlow) {
		m.badValue(p, "%v", r.err)
		return nil
	}
	if r.err != nil || len(r.addrs) == 0 {
		m.badValue(p, "the name has no address; %s", wantAddr)
		return nil
	}
	return r.addrs
}

// maxLookups is how long all names together may take.
const maxLookups = time.Minute

var errSlow = fmt.Errorf("not looked up: the names before it have taken more than %v", maxLookups)

// distinct drops repetitions.
func distinct(as []netip.Addr) (l []netip.Addr) {
	seen := make(map[netip.Addr]bool, len(as))
	for _, a := range as {
		if !seen[a] {
			seen[a] = true
			l = append(l, a)
		}
	}
	return l
}

// HostName reports whether s can be one: letters, digits, "-", "." and "_", and
// not all of it a number.
func HostName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	letter := false
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c|0x20 && c|0x20 <= 'z' || c == '_':
			letter = true
		case '0' <= c && c <= '9', c == '-', c == '.':
		default:
			return false
		}
	}
	return letter && !strings.HasPrefix(s, "0x")
}

// addrRange gives the prefixes that make up a range. Reversed bounds are
// exchanged, as in NanoSec, but not in silence.
func (m *entryMeaning) addrRange(p Param, a, b netip.Addr, ok bool) []netip.Prefix {
	switch {
	case !ok || a.Zone() != "" || b.Zone() != "" || a.Is4In6() || b.Is4In6():
		m.badValue(p, wantAddr)
		return nil
	case a.BitLen() != b.BitLen():
		m.badValue(p, "mixed address families")
		return nil
	case b.Less(a):
		m.l.Warnf(p.Value.Pos, "%s %s: range runs backwards, its bounds are exchanged", p.Key.Text, lexer.Shown(p.Value.Text))
		a, b = b, a
	}
	var ps []netip.Prefix
	for {
		// The largest prefix that begins at a and ends at or before b.
		n := a.BitLen() - trailingZeros(a)
		for b.Less(LastAddr(netip.PrefixFrom(a, n))) {
			n++
		}
		q := netip.PrefixFrom(a, n)
		ps = append(ps, q)
		if end := LastAddr(q); end == b {
			return ps
		} else {
			a = end.Next()
		}
	}
}

// trailingZeros counts the zero bits at the end of an address.
func trailingZeros(a netip.Addr) int {
	b := a.As16()
	n := bits.TrailingZeros64(binary.BigEndian.Uint64(b[8:]))
	if n == 64 {
		n += bits.TrailingZeros64(binary.BigEndian.Uint64(b[:8]))
	}
	return min(n, a.BitLen())
}

// LastAddr is the last address of a prefix.
func LastAddr(p netip.Prefix) netip.Addr {
	if p.Addr().Is4() {
		b := p.Addr().As4()
		fill(b[:], p.Bits())
		return netip.AddrFrom4(b)
	}
	b := p.Addr().As16()
	fill(b[:], p.Bits())
	return netip.AddrFrom16(b)
}

// fill sets the bits of b from number i on.
func fill(b []byte, i int) {
	if i%8 != 0 {
		b[i/8] |= 0xff >> (i % 8)
		i += 8 - i%8
	}
	for i /= 8; i < len(b); i++ {
		b[i] = 0xff
	}
}

// maskBits reads an IPv4 mask of leading ones, at least one.
func maskBits(s string) (int, bool) {
	var v uint32
	if a, err := netip.ParseAddr(s); err == nil && a.Is4() {
		b := a.As4()
		v = uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	} else if n, ok := number(s, 1<<32-1); ok && len(s) > 2 && s[1]|0x20 == 'x' {
		v = uint32(n)
	}
	n := 0
	for ; v&(1<<31) != 0; v <<= 1 {
		n++
	}
	return n, n > 0 && v == 0
}

// icmp reads type and code.
func (m *entryMeaning) icmp() {
	t, hasType := m.sel["type"]
	c, hasCode := m.sel["code"]
	if hasCode && !hasType {
		m.missing(c.Key, "code: type missing")
		return
	}
	if !hasType {
		return
	}
	if !isICMP(m.proto) {
		m.missing(t.Key, "type: needs ulp icmp or ipv6-icmp")
		return
	}
	m.types = m.icmpRange(t, icmpTypes[m.proto])
	if hasCode {
		m.codes = m.icmpRange(c, icmpCodes[m.proto])
	}
}

func (m *entryMeaning) icmpRange(p Param, names map[string]uint8) [][2]int {
	s := p.Value.Text
	if n, ok := names[strings.ToLower(s)]; ok {
		return [][2]int{{int(n), int(n)}}
	}
	lo, hi, interval := strings.Cut(s, "-")
	a, ok1 := number(lo, 255)
	b, ok2 := a, ok1
	if interval {
		b, ok2 = number(hi, 255)
	}
	switch {
	case !ok1 || !ok2:
		m.badValue(p, "want a number from 0 to 255, a range or a keyword of this protocol")
		return nil
	case b < a:
		m.badValue(p, "range runs backwards")
		return nil
	case a == 0 && b == 255:
		return nil
	}
	return [][2]int{{int(a), int(b)}}
}

// selectorList gives every selector that the entry means, as written.
func (m *entryMeaning) selectorList() []ipsec.Selector {
	if m.tun != nil && m.tun.transport {
		return m.tun.selectors()
	}
	pairs := m.pairs()
	types, codes := each(m.types), each(m.codes)
	if len(pairs)*len(types)*len(codes) > maxRules {
		m.errorf(Word{Pos: m.e.Pos}, "the entry stands for more than %d policies", maxRules)
		return nil
	}
	var out []ipsec.Selector
	for _, pair := range pairs {
		s := ipsec.Selector{Src: pair[0], Dst: pair[1], Proto: m.proto, SrcPort: m.sport, DstPort: m.dport}
		if !isICMP(m.proto) {
			out = append(out, s)
			continue
		}
		for _, t := range types {
			for _, c := range codes {
				s.SrcPort, s.DstPort = t, c
				out = append(out, s)
			}
		}
	}
	return out
}

// each lists ICMP types or codes as a Selector has them.
func each(ranges [][2]int) []uint16 {
	if ranges == nil {
		return []uint16{0}
	}
	var out []uint16
	for _, r := range ranges {
		for v := r[0]; v <= r[1]; v++ {
			out = append(out, uint16(v+1))
		}
	}
	return out
}

// pairs combines source and destination prefixes of equal family. Without
// addresses both families are meant, except by ICMP, which each has its own.
func (m *entryMeaning) pairs() [][2]netip.Prefix {
	any4, any6 := netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	src, dst := m.src, m.dst
	if len(src) == 0 {
		src = []netip.Prefix{any4, any6}
	}
	if len(dst) == 0 {
		dst = []netip.Prefix{any4, any6}
	}
	var out [][2]netip.Prefix
	mixed := true
	if len(src)*len(dst) > 4*maxRules {
		m.errorf(Word{Pos: m.e.Pos}, "the entry stands for more than %d policies", maxRules)
		return nil
	}
	for _, s := range src {
		for _, d := range dst {
			if s.Addr().BitLen() != d.Addr().BitLen() {
				continue
			}
			mixed = false
			if v6 := s.Addr().Is6(); m.proto == protoICMP && v6 || m.proto == protoICMPv6 && !v6 {
				continue
			}
			out = append(out, [2]netip.Prefix{s, d})
		}
	}
	switch p := m.sel["ulp"]; {
	case mixed:
		m.errorf(Word{Pos: m.e.Pos}, "mixed address families")
	case len(out) == 0 && m.proto == protoICMP:
		m.badValue(p, "the addresses are IPv6; want ipv6-icmp")
	case len(out) == 0:
		m.badValue(p, "the addresses are IPv4; want icmp")
	}
	return out
}

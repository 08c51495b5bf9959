package ipseckey

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
)

// extensions are those of one command while it is read.
type extensions struct {
	p     *parser
	c     Command
	given map[string]lexer.Pos
	key   lexer.Token // the one at hand
	bad   bool

	src, dst       []netip.Addr
	inner          [2]netip.Prefix // isrc, idst
	ports, iports  [2]uint16       // source, destination
	proto, iproto  uint8
	lport, rport   uint16 // of UDP encapsulation
	rem            netip.Addr
	encap, in, out bool
	value          lexer.Token // the second of the extension at hand, if it has two
}

// extension is what the table says of one.
type extension struct {
	values int
	take   func(x *extensions, v lexer.Token)
}

func (x *extensions) errorf(t lexer.Token, format string, a ...any) {
	x.bad = true
	x.p.l.Errorf(t.Pos, format, a...)
}

// badValue never shows the value, which may be a key out of place.
func (x *extensions) badValue(v lexer.Token, format string, a ...any) {
	x.errorf(v, "%s: %s", x.key.Text, fmt.Sprintf(format, a...))
}

func (x *extensions) number(v lexer.Token, limit uint64) uint64 {
	n, ok := number(v.Text, limit)
	if !ok {
		x.badValue(v, "want a number up to %d", limit)
	}
	return n
}

func num(limit uint64, set func(x *extensions, n uint64)) extension {
	return extension{values: 1, take: func(x *extensions, v lexer.Token) { set(x, x.number(v, limit)) }}
}

func port(set func(x *extensions, n uint16)) extension {
	return num(65535, func(x *extensions, n uint64) { set(x, uint16(n)) })
}

func bare(set func(x *extensions)) extension {
	return extension{take: func(x *extensions, _ lexer.Token) { set(x) }}
}

const (
	u32 = 1<<32 - 1
	u63 = 1<<63 - 1
)

func seconds(n uint64) time.Duration { return time.Duration(n) * time.Second }

var table map[string]extension

var keywords []string

func init() {
	limit := func(of func(x *extensions) *ipsec.Lifetime, what string) extension {
		switch what {
		case "bytes":
			return num(u63, func(x *extensions, n uint64) { of(x).Bytes = n })
		case "packets":
			return num(u63, func(x *extensions, n uint64) { of(x).Packets = n })
		case "addtime":
			return num(u32, func(x *extensions, n uint64) { of(x).AddTime = seconds(n) })
		}
		return num(u32, func(x *extensions, n uint64) { of(x).UseTime = seconds(n) })
	}
	table = map[string]extension{
		"spi":      num(u32, func(x *extensions, n uint64) { x.c.SA.SPI = ipsec.SPI(n) }),
		"pair-spi": num(u32, func(x *extensions, n uint64) { x.c.Pair = ipsec.SPI(n) }),
		"reqid":    num(u32, func(x *extensions, n uint64) { x.c.SA.ReqID = ipsec.ReqID(n) }),
		"inbound":  bare(func(x *extensions) { x.in = true }),
		"outbound": bare(func(x *extensions) { x.out = true }),
		"replay":   num(u32, func(x *extensions, n uint64) { x.c.SA.ReplayWindow = uint32(n) }),
		"esn":      bare(func(x *extensions) { x.c.SA.ESN = true }),
		"aggfrag":  bare(func(x *extensions) { x.c.SA.AggFrag = true }),
		"mode":     {values: 1, take: (*extensions).mode},
		"state":    {values: 1, take: (*extensions).state},
		"auth_alg": {values: 1, take: (*extensions).authAlg},
		"encr_alg": {values: 1, take: (*extensions).encrAlg},
		"authkey":  {values: 1, take: func(x *extensions, v lexer.Token) { x.c.SA.AuthKey = x.hexKey(v) }},
		"encrkey":  {values: 1, take: func(x *extensions, v lexer.Token) { x.c.SA.EncrKey = x.hexKey(v) }},
		"src":      {values: 1, take: func(x *extensions, v lexer.Token) { x.src = x.addrs(v) }},
		"dst":      {values: 1, take: func(x *extensions, v lexer.Token) { x.dst = x.addrs(v) }},
		"sport":    port(func(x *extensions, n uint16) { x.ports[0] = n }),
		"dport":    port(func(x *extensions, n uint16) { x.ports[1] = n }),
		"proto":    num(254, func(x *extensions, n uint64) { x.proto = uint8(n) }),
		"isrc":     {values: 1, take: func(x *extensions, v lexer.Token) { x.inner[0] = x.prefix(v) }},
		"idst":     {values: 1, take: func(x *extensions, v lexer.Token) { x.inner[1] = x.prefix(v) }},
		"isport":   port(func(x *extensions, n uint16) { x.iports[0] = n }),
		"idport":   port(func(x *extensions, n uint16) { x.iports[1] = n }),
		"iproto":   num(254, func(x *extensions, n uint64) { x.iproto = uint8(n) }),
		"encap": {values: 1, take: func(x *extensions, v lexer.Token) {
			if x.encap = v.Text == "udp"; !x.encap {
				x.badValue(v, "want udp")
			}
		}},
		"nat_lport": port(func(x *extensions, n uint16) { x.lport = n }),
		"nat_rport": port(func(x *extensions, n uint16) { x.rport = n }),

		"nat_rem": {values: 1, take: func(x *extensions, v lexer.Token) { x.rem = x.one(v) }},
		"nat_loc": {values: 1, take: func(x *extensions, v lexer.Token) {
			if x.one(v).IsValid() {
				x.p.l.Warnf(x.key.Pos, "nat_loc: not kept; checksums behind a NAT are made anew whatever our address is there")
			}
		}},

		"replay_value": num(u63, func(x *extensions, n uint64) { x.c.SA.LastSeq = n }),
		"idle_addtime": num(u32, func(x *extensions, n uint64) { x.c.SA.Idle.AddTime = seconds(n) }),
		"idle_usetime": num(u32, func(x *extensions, n uint64) { x.c.SA.Idle.UseTime = seconds(n) }),
		"srcidtype":    {values: 2, take: (*extensions).identity},
		"dstidtype":    {values: 2, take: (*extensions).identity},
	}
	for _, kind := range []struct {
		name string
		of   func(x *extensions) *ipsec.Lifetime
	}{
		{"soft_", func(x *extensions) *ipsec.Lifetime { return &x.c.SA.Soft }},
		{"hard_", func(x *extensions) *ipsec.Lifetime { return &x.c.SA.Hard }},
	} {
		for _, what := range []string{"bytes", "packets", "addtime", "usetime"} {
			table[kind.name+what] = limit(kind.of, what)
		}
	}
	for k := range table {
		keywords = append(keywords, k)
	}
	slices.Sort(keywords)
}

func (x *extensions) mode(v lexer.Token) {
	switch v.Text {
	case "transport":
		x.c.SA.Mode = ipsec.Transport
	case "tunnel":
		x.c.SA.Mode = ipsec.Tunnel
	default:
		x.badValue(v, "want transport or tunnel")
	}
}

// state takes what an SA with keys can be in; how near its end is tell its
// lifetimes.
func (x *extensions) state(v lexer.Token) {
	switch v.Text {
	case "mature", "1":
	case "dying", "2":
		x.p.l.Warnf(v.Pos, "state %s: the SA begins as mature", v.Text)
	default:
		x.badValue(v, "want mature; an SA that is larval or dead has no keys")
	}
}

// anySource is the source of an SA for packets from anywhere to dst.
func anySource(dst netip.Addr) netip.Addr {
	if dst.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// identity checks one and forgets it.
func (x *extensions) identity(v lexer.Token) {
	ok := false
	switch id := x.value.Text; v.Text {
	case "prefix":
		_, err1 := netip.ParsePrefix(id)
		_, err2 := netip.ParseAddr(id)
		ok = err1 == nil || err2 == nil
	case "fqdn", "domain":
		ok = ipsecconf.HostName(id)
	case "user_fqdn", "mailbox":
		user, host, at := strings.Cut(id, "@")
		ok = at && user != "" && ipsecconf.HostName(host)
	default:
		x.badValue(v, "want prefix, fqdn, domain, user_fqdn or mailbox, and an identity")
		return
	}
	if !ok {
		x.badValue(x.value, "want an identity of type %s", v.Text)
		return
	}
	x.p.l.Warnf(x.key.Pos, "%s: not kept; no policy asks for the identities of an SA with manual keys", x.key.Text)
}

// one reads an address, or a name that has one.
func (x *extensions) one(v lexer.Token) netip.Addr {
	as := x.addrs(v)
	if len(as) > 1 {
		x.badValue(v, "the name has several addresses")
	}
	if x.bad {
		return netip.Addr{}
	}
	return as[0]
}

func (x *extensions) authAlg(v lexer.Token) {
	a, err := ipsecconf.SAAuth(v.Text)
	if err != nil {
		x.badValue(v, "%v", err)
	}
	x.c.SA.Auth = a
}

func (x *extensions) encrAlg(v lexer.Token) {
	e, err := ipsecconf.SAEncr(v.Text)
	if err != nil {
		x.badValue(v, "%v", err)
	}
	x.c.SA.Encr = e
}

// hexKey reads hex[/bits]; bits have to be all of the key.
func (x *extensions) hexKey(v lexer.Token) ipsec.Key {
	digits, bits, slash := strings.Cut(v.Text, "/")
	k, err := ipsecconf.HexKey(digits)
	if err != nil {
		x.badValue(v, "%v", err)
		return k
	}
	if n, ok := number(bits, 1<<16); slash && (!ok || int(n) != k.Len()*8) {
		x.badValue(v, "key of %d bits, which is not what stands behind the slash; keys are not cut", k.Len()*8)
	}
	return k
}

func (x *extensions) addrs(v lexer.Token) []netip.Addr {
	as, ok := x.p.addrs(v.Text)
	if !ok {
		x.badValue(v, "want an address or the name of a host")
	}
	six := strings.HasSuffix(x.key.Text, "6")
	as = slices.DeleteFunc(slices.Clone(as), func(a netip.Addr) bool { return six && !a.Is6() })
	if ok && len(as) == 0 {
		x.badValue(v, "want an IPv6 address")
	}
	return as
}

func (x *extensions) prefix(v lexer.Token) netip.Prefix {
	if p, err := netip.ParsePrefix(v.Text); err == nil && !p.Addr().Is4In6() {
		return p.Masked()
	}
	a := x.one(v)
	if x.bad {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// finish makes commands of what was given, one for each pair of addresses.
func (x *extensions) finish() []Command {
	c := &x.c
	c.SA.Proto, c.Proto = c.Proto, 0
	at := lexer.Token{Pos: c.Pos}
	switch {
	case x.given["spi"] == lexer.Pos{}:
		x.errorf(at, "%s: spi missing", c.Verb)
	case len(x.dst) == 0:
		x.errorf(at, "%s: dst missing", c.Verb)
	case c.Verb == Delete || c.Verb == DeletePair || c.Verb == Get:
		for name, pos := range x.given {
			if name != "spi" && name != "dst" && name != "src" && name != "inbound" && name != "outbound" {
				x.errorf(lexer.Token{Pos: pos}, "%s: not with %s", name, c.Verb)
			}
		}
	case c.Verb == Update || c.Verb == UpdatePair:
		x.part(at)
	default:
		x.whole(at)
	}
	var cs []Command
	for _, dst := range x.dst {
		src := netip.Addr{}
		if len(x.src) > 0 {
			k := slices.IndexFunc(x.src, func(a netip.Addr) bool { return a.BitLen() == dst.BitLen() })
			if k < 0 {
				continue
			}
			src = x.src[k]
		} else if c.Verb == Add {
			if src = anySource(dst); c.SA.Mode == ipsec.Tunnel || c.SA.Encap != nil {
				x.errorf(at, "%s: src missing; an SA in tunnel mode or in UDP has one", c.Verb)
				break
			}
		}
		d := x.c
		d.SA.Dst, d.SA.Src = dst, src
		d.SA.EncrKey, d.SA.AuthKey, d.given = c.SA.EncrKey.Clone(), c.SA.AuthKey.Clone(), x.given
		x.selectors(&d)
		cs = append(cs, d)
	}
	if len(cs) == 0 && !x.bad {
		x.errorf(at, "%s: mixed address families", c.Verb)
	}
	c.SA.Wipe()
	if x.bad {
		Wipe(cs)
		return nil
	}
	return cs
}

// whole checks what the extensions of an SA are together.
func (x *extensions) whole(at lexer.Token) {
	sa := &x.c.SA
	check := func(name string, err error) {
		if err != nil {
			pos := x.given[name]
			if !pos.IsValid() {
				pos = at.Pos
			}
			x.errorf(lexer.Token{Pos: pos}, "%s: %v", name, err)
		}
	}
	switch {
	case x.in && x.out:
		x.errorf(at, "inbound and outbound are two SAs")
	case sa.Encr == alg.EncrNone && sa.EncrKey.Len() > 0:
		x.errorf(at, "encrkey without encr_alg")
	case sa.Auth == alg.IntegNone && sa.AuthKey.Len() > 0:
		x.errorf(at, "authkey without auth_alg")
	}
	if x.bad {
		return
	}
	if sa.Proto == ipsec.ESP && sa.Encr == alg.EncrNone && sa.Auth != alg.IntegNone {
		sa.Encr = alg.EncrNULL
	}
	check("encrkey", ipsecconf.CheckEncrKey(sa.Encr, sa.EncrKey))
	if sa.Auth != alg.IntegNone {
		check("authkey", ipsecconf.CheckAuthKey(sa.Auth, sa.AuthKey))
	}
	probe := *sa
	probe.Src, probe.Dst = x.dst[0], x.dst[0] // families are finish's
	if err := ipsecconf.CheckSA(&probe, x.p.opt.Unauthenticated); err != nil {
		x.errorf(at, "%s: %v", x.c.Verb, err)
	}
	switch {
	case sa.LastSeq == 0:
	case sa.Encr.Info().Old || sa.Auth.Info().Old:
		x.errorf(lexer.Token{Pos: x.given["replay_value"]}, "replay_value: packets of this algorithm have no sequence number")
	case !sa.ESN && sa.LastSeq >= u32:
		x.errorf(lexer.Token{Pos: x.given["replay_value"]}, "replay_value: no sequence number comes behind it; want one below %d, or esn", u32)
	}
	if x.c.SA.ESN && x.c.SA.ReplayWindow == 0 {
		x.errorf(at, "esn without replay") // RFC 4303, 2.2.1 and A2
	}
	if ipsecconf.UsesCounter(sa) && x.c.Verb == Add {
		x.p.l.Warnf(at.Pos, "add: %s", ipsecconf.StaticAEAD)
	}
	if w := ipsecconf.Unauthenticated(sa); w != "" {
		x.p.l.Warnf(at.Pos, "%s: %s", x.c.Verb, w)
	}
	if w := ipsecconf.Legacy(sa.Encr, sa.Auth); w != "" {
		x.p.l.Warnf(at.Pos, "%s: %s", x.c.Verb, w)
	}
	x.settleMode(at)
	if sa.AggFrag && (sa.Proto != ipsec.ESP || sa.Mode != ipsec.Tunnel) {
		x.errorf(at, "aggfrag: want esp in mode tunnel") // RFC 9347
	}
	x.udp(at)
}

// part checks what an update gives.
func (x *extensions) part(at lexer.Token) {
	if x.given["src"] == (lexer.Pos{}) && slices.ContainsFunc(selectorKeys, func(k string) bool { return x.given[k].IsValid() }) {
		x.errorf(at, "%s: src missing, which a selector goes with", x.c.Verb)
	}
	if x.in && x.out {
		x.errorf(at, "inbound and outbound are two SAs")
	}
	x.settleMode(at)
	x.udp(at)
}

// settleMode finds the mode that was not said.
func (x *extensions) settleMode(at lexer.Token) {
	sa := &x.c.SA
	tunnel := (x.proto == 4 || x.proto == 41) && (x.inner[0].IsValid() || x.inner[1].IsValid() || x.iports != [2]uint16{})
	switch {
	case sa.Mode != ipsec.ModeAny: // said
	case tunnel:
		sa.Mode = ipsec.Tunnel
	default:
		sa.Mode = ipsec.Transport
	}
	if sa.Mode == ipsec.Transport && (x.inner != [2]netip.Prefix{} || x.iports != [2]uint16{} || x.iproto != 0) {
		x.errorf(at, "inner selectors are for tunnel mode: want proto 4 or 41, or mode tunnel")
	}
}

// udp reads the ports of UDP encapsulation, which SAs have in their own direction.
func (x *extensions) udp(at lexer.Token) {
	switch {
	case !x.encap && slices.ContainsFunc(natKeys, func(k string) bool { return x.given[k].IsValid() }):
		x.errorf(at, "nat_lport, nat_rport, nat_loc and nat_rem: encap udp missing")
	case x.encap && x.c.SA.Proto != ipsec.ESP:
		x.errorf(at, "encap: only with esp")
	}
	if !x.encap {
		return
	}
	for _, p := range []*uint16{&x.lport, &x.rport} {
		if *p == 0 {
			*p = 4500
		}
	}
	switch {
	case x.in:
		x.c.SA.Encap = &ipsec.Encap{SPort: x.rport, DPort: x.lport}
	case x.out || x.lport == x.rport:
		x.c.SA.Encap = &ipsec.Encap{SPort: x.lport, DPort: x.rport}
	default:
		x.errorf(at, "nat_lport and nat_rport: say inbound or outbound")
		return
	}
	x.c.SA.Encap.OA = x.rem
}

// natKeys go with encap.
var natKeys = []string{"nat_lport", "nat_rport", "nat_loc", "nat_rem"}

// selectors gives the SA what packets it may carry, if that was said.
func (x *extensions) selectors(c *Command) {
	ts := func(p netip.Prefix, host netip.Addr, proto uint8, port uint16) ipsec.TrafficSelector {
		if !p.IsValid() {
			p = netip.PrefixFrom(host, host.BitLen())
		}
		t := ipsec.TrafficSelector{Proto: proto, Start: p.Addr(), End: ipsecconf.LastAddr(p), PortHi: 65535}
		if port != 0 {
			t.PortLo, t.PortHi = port, port
		}
		return t
	}
	proto, ports := x.proto, x.ports
	if c.SA.Mode == ipsec.Tunnel {
		if proto, ports = x.iproto, x.iports; x.inner == [2]netip.Prefix{} && ports == [2]uint16{} && proto == 0 {
			return
		}
		for i := range x.inner {
			if o := x.inner[1-i]; !x.inner[i].IsValid() {
				a := netip.IPv4Unspecified()
				if o.IsValid() && o.Addr().Is6() || !o.IsValid() && c.SA.Dst.Is6() {
					a = netip.IPv6Unspecified()
				}
				x.inner[i] = netip.PrefixFrom(a, 0)
			}
		}
		if x.inner[0].Addr().BitLen() != x.inner[1].Addr().BitLen() {
			x.errorf(lexer.Token{Pos: c.Pos}, "isrc and idst: mixed address families")
			return
		}
	} else if proto == 0 && ports == [2]uint16{} {
		return
	}
	c.SA.SrcTS = []ipsec.TrafficSelector{ts(x.inner[0], c.SA.Src, proto, ports[0])}
	c.SA.DstTS = []ipsec.TrafficSelector{ts(x.inner[1], c.SA.Dst, proto, ports[1])}
}

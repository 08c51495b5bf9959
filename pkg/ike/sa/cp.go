package sa

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

// Configuration payloads in IKE_AUTH (RFC 7296, 2.19): the initiator asks for
// addresses inside, the responder leases them.
//
//	HDR, SK {IDi, AUTH, CP(CFG_REQUEST), SAi2, TSi, TSr}  -->
//	                    <--  HDR, SK {IDr, AUTH, CP(CFG_REPLY), SAr2, TSi, TSr}
//	                    or   HDR, SK {IDr, AUTH, N(INTERNAL_ADDRESS_FAILURE)}
//
// The IKE SA stays in the last case, without a child SA. In other exchanges the
// payload is skipped.

// Wanted is what a peer asks for: an address of a family, perhaps one that it had.
type Wanted struct {
	V4, V6   bool
	Had4     netip.Addr
	Had6     netip.Addr
	dns      bool
	domains  bool
	netmask  bool
	subnets4 bool
	subnets6 bool
}

// Lease is what a peer is given: addresses, invalid where there is none of the
// family, and what goes with them. Subnets are the networks behind the responder.
type Lease struct {
	V4, V6  netip.Addr
	DNS     []netip.Addr
	Domains []string
	Subnets []netip.Prefix
}

// Addrs lists the addresses.
func (l Lease) Addrs() (as []netip.Addr) {
	for _, a := range []netip.Addr{l.V4, l.V6} {
		if a.IsValid() {
			as = append(as, a)
		}
	}
	return as
}

// Leaser is what a Host may be besides: it has addresses for peers.
type Leaser interface {
	// Lease gives p, which has proven its identity, addresses of its rule's
	// pools until the lineage has Failed. An error: nothing of what p wants is
	// left.
	Lease(p Peer, w Wanted) (Lease, error)
}

// Configured is what the responder has assigned us. It comes before the InstallChild
// of the child SA that the addresses are for, once for a lineage.
type Configured struct{ Lease Lease }

func (Configured) output() {}

const (
	maxLeaseDNS     = 16 // of each kind, in an answer that we believe
	maxLeaseDomains = 64
)

// configRequest asks for what the rule says; none: no addresses.
func (s *SA) configRequest() []ikev2.Payload {
	q := s.rule.Request
	if !q.Any() {
		return nil
	}
	c := &ikev2.Config{Type: ikev2.CFGRequest}
	add := func(t ikev2.ConfigType, v []byte) {
		c.Attributes = append(c.Attributes, ikev2.ConfigAttribute{Type: t, Value: v})
	}
	had := append([]netip.Addr{q.Addr}, s.cfg.Had...)
	wish := func(bits int) (a netip.Addr) {
		if i := slices.IndexFunc(had, func(a netip.Addr) bool { return a.BitLen() == bits }); i >= 0 {
			a = had[i]
		}
		return a
	}
	if q.V4 {
		add(ikev2.ConfigIP4Address, wish(32).AsSlice())
	}
	if q.V6 {
		v := wish(128).AsSlice()
		if v != nil {
			v = append(v, 128)
		}
		add(ikev2.ConfigIP6Address, v)
	}
	if q.DNS {
		if q.V4 {
			add(ikev2.ConfigIP4DNS, nil)
		}
		if q.V6 {
			add(ikev2.ConfigIP6DNS, nil)
		}
		add(ikev2.ConfigDNSDomain, nil) // RFC 8598, 3.1
	}
	if q.V4 {
		add(ikev2.ConfigIP4Subnet, nil)
	}
	if q.V6 {
		add(ikev2.ConfigIP6Subnet, nil)
	}
	return []ikev2.Payload{c}
}

// wanted reads a CFG_REQUEST. What is malformed in it counts as without value,
// and unknown attributes for nothing (RFC 7296, 3.15.1).
func wanted(c *ikev2.Config) (w Wanted) {
	for _, a := range c.Attributes {
		switch a.Type {
		case ikev2.ConfigIP4Address:
			if w.V4 = true; !w.Had4.IsValid() && len(a.Value) == 4 {
				if v := netip.AddrFrom4([4]byte(a.Value)); !v.IsUnspecified() {
					w.Had4 = v
				}
			}
		case ikev2.ConfigIP6Address:
			if w.V6 = true; !w.Had6.IsValid() && len(a.Value) == 17 {
				if v := netip.AddrFrom16([16]byte(a.Value[:16])); v.Is6() && !v.Is4In6() && !v.IsUnspecified() {
					w.Had6 = v
				}
			}
		case ikev2.ConfigIP4DNS, ikev2.ConfigIP6DNS:
			w.dns = true
		case ikev2.ConfigDNSDomain:
			w.domains = true
		case ikev2.ConfigIP4Netmask:
			w.netmask = true
		case ikev2.ConfigIP4Subnet:
			w.subnets4 = true
		case ikev2.ConfigIP6Subnet:
			w.subnets6 = true
		}
	}
	return w
}

// reply makes the CFG_REPLY of a lease: what was asked for, and no more.
func (l Lease) reply(w Wanted) *ikev2.Config {
	c := &ikev2.Config{Type: ikev2.CFGReply}
	add := func(t ikev2.ConfigType, v ...byte) {
		c.Attributes = append(c.Attributes, ikev2.ConfigAttribute{Type: t, Value: v})
	}
	if l.V4.IsValid() {
		add(ikev2.ConfigIP4Address, l.V4.AsSlice()...)
		if w.netmask {
			add(ikev2.ConfigIP4Netmask, 255, 255, 255, 255) // the traffic selectors say where to
		}
	}
	if l.V6.IsValid() {
		add(ikev2.ConfigIP6Address, append(l.V6.AsSlice(), 128)...)
	}
	if w.dns {
		for _, a := range l.DNS {
			switch {
			case a.Is4():
				add(ikev2.ConfigIP4DNS, a.AsSlice()...)
			default:
				add(ikev2.ConfigIP6DNS, a.AsSlice()...)
			}
		}
		if w.domains && len(l.DNS) > 0 { // RFC 8598, 3.2: domains go with servers
			for _, d := range l.Domains {
				add(ikev2.ConfigDNSDomain, []byte(d)...)
			}
		}
	}
	for _, p := range l.Subnets {
		a := p.Masked().Addr()
		switch {
		case a.Is4() && w.subnets4:
			add(ikev2.ConfigIP4Subnet, append(a.AsSlice(), net.CIDRMask(p.Bits(), 32)...)...)
		case a.Is6() && w.subnets6:
			add(ikev2.ConfigIP6Subnet, append(a.AsSlice(), byte(p.Bits()))...)
		}
	}
	return c
}

// leaseOf reads a CFG_REPLY as far as it answers q: the first address of each
// family, name servers, domains and networks. An error names an attribute that
// cannot be what it should be. Of those, name servers, domains and networks are no
// more than advice: left out, and odd names the first.
func leaseOf(c *ikev2.Config, v4, v6 bool) (l Lease, odd, err error) {
	bad := func(a ikev2.ConfigAttribute) error {
		return fmt.Errorf("%v of %d octets: %x", a.Type, len(a.Value), a.Value[:min(len(a.Value), 20)])
	}
	leave := func(a ikev2.ConfigAttribute) {
		if odd == nil {
			odd = bad(a)
		}
	}
	for _, a := range c.Attributes {
		if len(a.Value) == 0 {
			continue // the peer has none
		}
		v := a.Value
		switch a.Type {
		case ikev2.ConfigIP4Address:
			if len(v) != 4 || !usable(netip.AddrFrom4([4]byte(v))) {
				return Lease{}, odd, bad(a)
			}
			if v4 && !l.V4.IsValid() {
				l.V4 = netip.AddrFrom4([4]byte(v))
			}
		case ikev2.ConfigIP4DNS:
			if len(v) != 4 || !usable(netip.AddrFrom4([4]byte(v))) {
				leave(a)
				continue
			}
			l.addDNS(netip.AddrFrom4([4]byte(v)))
		case ikev2.ConfigIP6Address:
			if len(v) != 17 || v[16] > 128 || !usable(netip.AddrFrom16([16]byte(v[:16]))) {
				return Lease{}, odd, bad(a)
			}
			if v6 && !l.V6.IsValid() {
				l.V6 = netip.AddrFrom16([16]byte(v[:16]))
			}
		case ikev2.ConfigIP6DNS:
			if len(v) != 16 || !usable(netip.AddrFrom16([16]byte(v))) {
				leave(a)
				continue
			}
			l.addDNS(netip.AddrFrom16([16]byte(v)))
		case ikev2.ConfigIP4Subnet:
			ones, bits := 0, 0
			if len(v) == 8 {
				ones, bits = net.IPMask(v[4:]).Size()
			}
			if bits != 32 {
				leave(a)
				continue
			}
			l.addSubnet(netip.PrefixFrom(netip.AddrFrom4([4]byte(v[:4])), ones))
		case ikev2.ConfigIP6Subnet:
			if len(v) != 17 || v[16] > 128 {
				leave(a)
				continue
			}
			l.addSubnet(netip.PrefixFrom(netip.AddrFrom16([16]byte(v[:16])), int(v[16])))
		case ikev2.ConfigDNSDomain:
			if !domainName(string(v)) {
				leave(a)
				continue
			}
			if len(l.Domains) < maxLeaseDomains {
				l.Domains = append(l.Domains, string(v))
			}
		}
	}
	if len(l.DNS) == 0 {
		l.Domains = nil // RFC 8598, 3.2
	}
	return l, odd, nil
}

func (l *Lease) addDNS(a netip.Addr) {
	if len(l.DNS) < maxLeaseDNS {
		l.DNS = append(l.DNS, a)
	}
}

func (l *Lease) addSubnet(p netip.Prefix) {
	if len(l.Subnets) < maxTS {
		l.Subnets = append(l.Subnets, p.Masked())
	}
}

// usable: a host may have the address.
func usable(a netip.Addr) bool {
	return !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() && !a.Is4In6() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// domainName: it goes into logs and to resolvers, so nothing but letters, digits,
// hyphens, underscores and dots.
func domainName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	for _, l := range strings.Split(s, ".") {
		if l == "" || len(l) > 63 || strings.Trim(l, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
			return false
		}
	}
	return true
}

// configured takes the responder's answer. Without the address that we asked for
// the child SA may still be of use: the policy decides.
func (s *SA) configured(ps []ikev2.Payload) error {
	q := s.rule.Request
	c := ikev2.Find[*ikev2.Config](ps)
	if !q.Any() {
		return nil // nobody asked
	}
	if c == nil || c.Type != ikev2.CFGReply {
		s.log(levelWarn, "the peer has assigned no address")
		return nil
	}
	l, odd, err := leaseOf(c, q.V4, q.V6)
	if err != nil {
		return fmt.Errorf("CFG_REPLY: %w", err)
	}
	if odd != nil {
		s.log(levelWarn, "left out of what the peer has assigned", attrErr(odd))
	}
	if !q.DNS {
		l.DNS, l.Domains = nil, nil
	}
	if s.lease = l; q.V4 && !l.V4.IsValid() || q.V6 && !l.V6.IsValid() {
		s.log(levelWarn, "the peer has not assigned an address of each family", slog.Any("addresses", l.Addrs()))
	}
	s.emit(Configured{l})
	return nil
}

// give leases addresses to a peer that asks for some, if the rule has pools.
// It returns the answer, or an error for INTERNAL_ADDRESS_FAILURE.
func (s *SA) give(ps []ikev2.Payload) (answer []ikev2.Payload, err error) {
	c := ikev2.Find[*ikev2.Config](ps)
	if c == nil || c.Type != ikev2.CFGRequest || len(s.rule.Pools) == 0 {
		return nil, nil
	}
	w := wanted(c)
	if w.V4 || w.V6 {
		h, ok := s.cfg.Host.(Leaser)
		if !ok {
			return nil, errors.New("no addresses here")
		}
		if s.lease, err = h.Lease(s.peer, w); err != nil {
			return nil, err
		}
		s.log(levelInfo, "addresses leased", slog.String("id", s.peer.RemoteID.String()), slog.Any("addresses", s.lease.Addrs()))
	}
	return []ikev2.Payload{s.lease.reply(w)}, nil
}

// ofPeer cuts a peer's side of a policy that leaves the peer open to what the
// rule says is the peer's: child_addr, and addresses that it has leased. A rule
// without either cuts nothing.
func (s *SA) ofPeer(p Policy, r ipsec.TrafficSelector) []ipsec.TrafficSelector {
	q := anyRequest(p.Out)
	if q == nil || !q.AnyPeer() || len(s.rule.ChildAddrs) == 0 && len(s.rule.Pools) == 0 {
		return []ipsec.TrafficSelector{r}
	}
	var own []ipsec.TrafficSelector
	for _, a := range s.rule.ChildAddrs {
		own = append(own, ipsec.TrafficSelector{Start: a.From, End: a.To, PortHi: 65535})
	}
	if !s.initiator {
		for _, a := range s.lease.Addrs() {
			own = append(own, addrTS(a))
		}
	}
	return narrow([]ipsec.TrafficSelector{r}, own)
}

// ours cuts our side of what we ask for to the addresses that we were assigned,
// where the policy has any of them.
func (s *SA) ours(l ipsec.TrafficSelector) []ipsec.TrafficSelector {
	if s.initiator {
		var own []ipsec.TrafficSelector
		for _, a := range s.lease.Addrs() {
			own = append(own, addrTS(a))
		}
		if cut := narrow([]ipsec.TrafficSelector{l}, own); len(cut) > 0 {
			return cut
		}
	}
	return []ipsec.TrafficSelector{l}
}

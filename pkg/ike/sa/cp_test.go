package sa

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
)

var (
	inside4 = netip.MustParseAddr("10.9.0.7")
	inside6 = netip.MustParseAddr("2001:db8:9::7")
)

// leasing makes b a gateway with pools for whoever comes, and a one who asks.
func leasing(t testing.TB, l *lab) {
	l.b.rule.Pools = []*pad.Pool{{Name: "p"}}
	l.b.lease = func(w Wanted) (Lease, error) {
		x := Lease{
			DNS: []netip.Addr{netip.MustParseAddr("10.2.0.53"), netip.MustParseAddr("2001:db8::53")}, Domains: []string{"corp.example.com"},
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("2001:db8::/48")},
		}
		if w.V4 {
			x.V4 = inside4
		}
		if w.V6 {
			x.V6 = inside6
		}
		return x, nil
	}
	open := func(local, remote string, id ipsec.ReqID) Policy {
		p := tunnel(local, remote, id)
		p.Out.Requests = []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: id, Src: addrB.Addr(), Dst: netip.IPv4Unspecified()}}
		return p
	}
	l.b.policies = []Policy{open("10.2.0.0/16", "0.0.0.0/0", 22), open("2001:db8::/48", "::/0", 23)}
	l.a.rule.Request = pad.Request{V4: true, V6: true, DNS: true}
}

func askAll() []ChildRequest {
	return []ChildRequest{{Seq: 1, Policy: tunnel("0.0.0.0/0", "10.2.0.0/16", 11)}, {Seq: 2, Policy: tunnel("::/0", "2001:db8::/48", 12)}}
}

// only checks that all SAs are for these addresses of a, on both sides.
func (l *lab) only(addrs ...netip.Addr) {
	l.t.Helper()
	for _, n := range []*node{l.a, l.b} {
		for id, p := range n.sads {
			side := p.SrcTS
			if id.Dst == addrA.Addr() {
				side = p.DstTS
			}
			if len(side) != 1 || side[0].Start != side[0].End || !slices.Contains(addrs, side[0].Start) {
				l.t.Errorf("%s: SA %v is for %v, want one of %v", n.name, id, side, addrs)
			}
		}
	}
}

// TestAddresses: whoever asks gets an address of each family and what goes with
// it, child SAs are for that address alone, and stay so when either side rekeys.
func TestAddresses(t *testing.T) {
	withFaults(t, func(t *testing.T, l *lab) {
		leasing(t, l)
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, askAll()...))
		l.settle()
		l.want(2)
		l.only(inside4, inside6)
		want, _ := l.b.lease(Wanted{V4: true, V6: true})
		got := told[Configured](l.a)
		if len(got) != 1 || !reflect.DeepEqual(got[0].Lease, want) {
			t.Fatalf("configured %+v, want %+v", got, want)
		}
		install := slices.IndexFunc(l.a.events, func(o Output) bool { _, ok := o.(InstallChild); return ok })
		if at := slices.IndexFunc(l.a.events, func(o Output) bool { _, ok := o.(Configured); return ok }); at > install {
			t.Error("the address comes after the child SA")
		}
		for _, n := range []*node{l.a, l.b} {
			_, outs := n.sa.RekeyChildren(l.now)
			n.do(outs)
			l.settle()
			l.want(2)
			l.only(inside4, inside6)
		}
		l.a.do(l.a.sa.Rekey(l.now))
		l.settle()
		l.a.do(l.a.sa.AddChild(l.now, askAll()[0]))
		l.settle()
		l.only(inside4, inside6)
	})
}

// TestAddressOfOneFamily: who asks for one family gets that, and child SAs of it.
func TestAddressOfOneFamily(t *testing.T) {
	for k, want := range []netip.Addr{inside4, inside6} {
		l := newLab(t)
		leasing(t, l)
		l.a.rule.Request = pad.Request{V4: k == 0, V6: k == 1}
		l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
		l.a.do(l.a.sa.Start(l.now, askAll()[k]))
		l.settle()
		l.want(1)
		l.only(want)
		if got := told[Configured](l.a); len(got) != 1 || !slices.Equal(got[0].Lease.Addrs(), []netip.Addr{want}) {
			t.Errorf("configured %+v, want %v", got, want)
		}
	}
}

// TestDomainsWithoutServers: of domains without a name server neither side makes
// anything (RFC 8598, 3.2).
func TestDomainsWithoutServers(t *testing.T) {
	domain := ikev2.ConfigAttribute{Type: ikev2.ConfigDNSDomain, Value: []byte("corp.example.com")}
	l, _, err := leaseOf(&ikev2.Config{Type: ikev2.CFGReply, Attributes: []ikev2.ConfigAttribute{domain}}, true, true)
	if err != nil || l.Domains != nil {
		t.Errorf("took %v, %v", l.Domains, err)
	}
	c := Lease{V4: inside4, Domains: []string{"corp.example.com"}}.reply(Wanted{V4: true, dns: true, domains: true})
	if slices.ContainsFunc(c.Attributes, func(a ikev2.ConfigAttribute) bool { return a.Type == ikev2.ConfigDNSDomain }) {
		t.Errorf("replies %v", c.Attributes)
	}
}

// TestAddressFailure: without an address the IKE SA stays, and there is no child
// SA (RFC 7296, 3.10.1).
func TestAddressFailure(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(l *lab)
		want ikev2.NotifyType
	}{
		{"exhausted", func(l *lab) {
			l.b.lease = func(Wanted) (Lease, error) { return Lease{}, errors.New("none left") }
		}, ikev2.INTERNAL_ADDRESS_FAILURE},
		{"not asked for", func(l *lab) { l.a.rule.Request = pad.Request{} }, ikev2.FAILED_CP_REQUIRED},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			leasing(t, l)
			tt.set(l)
			l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
			l.a.do(l.a.sa.Start(l.now, askAll()[0]))
			l.settle()
			l.want(0)
			var pe *PeerError
			if f := told[ChildFailed](l.a); len(f) != 1 || !errors.As(f[0].Err, &pe) || pe.Notify != tt.want {
				t.Errorf("child SA: %+v, want refusal by %v", f, tt.want)
			}
		})
	}
}

// TestChildAddr: of a policy for any peer one gets what child_addr says is its own.
func TestChildAddr(t *testing.T) {
	l := newLab(t)
	leasing(t, l)
	l.a.rule.Request, l.b.rule.Pools = pad.Request{}, nil
	own := netip.MustParseAddr("10.1.7.7")
	l.b.rule.ChildAddrs = []pad.Range{pad.One(own)}
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, askAll()[0]))
	l.settle()
	l.want(1)
	l.only(own)
}

// TestHad: an address that we had is asked for again.
func TestHad(t *testing.T) {
	l := newLab(t)
	leasing(t, l)
	var asked Wanted
	give := l.b.lease
	l.b.lease = func(w Wanted) (Lease, error) { asked = w; return give(w) }
	l.a.cfg.Had = []netip.Addr{inside6, inside4}
	l.a.sa = NewInitiator(l.a.cfg, l.a.rule)
	l.a.do(l.a.sa.Start(l.now, askAll()...))
	l.settle()
	if asked.Had4 != inside4 || asked.Had6 != inside6 {
		t.Errorf("asked for %v, %v", asked.Had4, asked.Had6)
	}
}

func TestLeaseOf(t *testing.T) {
	a := func(t ikev2.ConfigType, v ...byte) ikev2.ConfigAttribute {
		return ikev2.ConfigAttribute{Type: t, Value: v}
	}
	for _, tt := range []struct {
		name string
		in   ikev2.ConfigAttribute
		ok   bool // else odd what is advice, an error of addresses
	}{
		{"nothing", a(ikev2.ConfigIP4Address), true},
		{"unknown", a(0x7000, 1, 2, 3), true},
		{"DNSSEC_TA is skipped", a(ikev2.ConfigDNSSECTA, 1, 2), true},
		{"IPv4 of 3 octets", a(ikev2.ConfigIP4Address, 10, 0, 0), false},
		{"IPv4 of 5 octets", a(ikev2.ConfigIP4Address, 10, 0, 0, 1, 1), false},
		{"unspecified", a(ikev2.ConfigIP4Address, 0, 0, 0, 0), false},
		{"broadcast", a(ikev2.ConfigIP4Address, 255, 255, 255, 255), false},
		{"loopback", a(ikev2.ConfigIP4Address, 127, 0, 0, 1), false},
		{"multicast", a(ikev2.ConfigIP4DNS, 224, 0, 0, 1), false},
		{"IPv6 without prefix length", a(ikev2.ConfigIP6Address, inside6.AsSlice()...), false},
		{"IPv6 prefix of 129", a(ikev2.ConfigIP6Address, append(inside6.AsSlice(), 129)...), false},
		{"IPv4 as IPv6", a(ikev2.ConfigIP6DNS, append(make([]byte, 10), 255, 255, 10, 0, 0, 1)...), false},
		{"mask with holes", a(ikev2.ConfigIP4Subnet, 10, 0, 0, 0, 255, 0, 255, 0), false},
		{"IPv6 network of 129", a(ikev2.ConfigIP6Subnet, append(inside6.AsSlice(), 129)...), false},
		{"domain", a(ikev2.ConfigDNSDomain, []byte("corp.example.")...), true},
		{"domain with a line feed", a(ikev2.ConfigDNSDomain, []byte("a\nb")...), false},
		{"empty label", a(ikev2.ConfigDNSDomain, []byte("a..b")...), false},
	} {
		good := a(ikev2.ConfigIP4Address, inside4.AsSlice()...)
		l, odd, err := leaseOf(&ikev2.Config{Type: ikev2.CFGReply, Attributes: []ikev2.ConfigAttribute{tt.in, good}}, true, true)
		address := tt.in.Type == ikev2.ConfigIP4Address || tt.in.Type == ikev2.ConfigIP6Address
		if (err == nil) != (tt.ok || !address) || (odd == nil) != (tt.ok || address) {
			t.Errorf("%s: %v, left out %v", tt.name, err, odd)
		}
		if err == nil && !reflect.DeepEqual(l, Lease{V4: inside4}) {
			t.Errorf("%s: took %+v", tt.name, l)
		}
	}
}

// FuzzConfig: any payload may come from a peer that is authenticated. What we take
// of it is bounded, and a lease is read as it was written.
func FuzzConfig(f *testing.F) {
	l := Lease{V4: inside4, V6: inside6, DNS: []netip.Addr{inside4}, Domains: []string{"a.example"}, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	all := Wanted{V4: true, V6: true, dns: true, domains: true, netmask: true, subnets4: true, subnets6: true}
	seed, _ := l.reply(all).Append(nil)
	f.Add(seed[4:])
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &ikev2.Config{Type: ikev2.CFGReply}
		for len(b) >= 4 {
			n := min(int(b[2])<<8|int(b[3]), len(b)-4)
			c.Attributes = append(c.Attributes, ikev2.ConfigAttribute{Type: ikev2.ConfigType(b[0]&0x7f)<<8 | ikev2.ConfigType(b[1]), Value: b[4 : 4+n]})
			b = b[4+n:]
		}
		if len(c.Attributes) > 100 {
			return
		}
		wanted(c)
		l, _, err := leaseOf(c, true, true)
		if err != nil {
			return
		}
		if len(l.DNS) > 2*maxLeaseDNS || len(l.Domains) > maxLeaseDomains || len(l.Subnets) > maxTS {
			t.Fatalf("took %+v", l)
		}
		again, odd, err := leaseOf(l.reply(all), true, true)
		if err != nil || odd != nil || !reflect.DeepEqual(again, l) {
			t.Fatalf("read %+v (%v), want %+v", again, err, l)
		}
	})
}

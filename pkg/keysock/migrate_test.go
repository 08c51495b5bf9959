package keysock

import (
	"net/netip"
	"reflect"
	"syscall"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// migrateMessage moves an outbound tunnel from 192.0.2.1, 198.51.100.2 to other
// end points.
func migrateMessage() *pfkey.Message {
	m := &pfkey.Message{Header: pfkey.Header{Type: pfkey.XMigrate, Seq: 21, Pid: 22}}
	if err := putSelector(m, policy(1).Sel); err != nil {
		panic(err)
	}
	q := pfkey.Request{Proto: 50, Mode: pfkey.ModeTunnel, Level: pfkey.LevelUnique, ReqID: 7}
	was, is := q, q
	was.Src, was.Dst = addr("192.0.2.1"), addr("198.51.100.2")
	is.Src, is.Dst = addr("2001:db8::1"), addr("2001:db8::2")
	m.Policy = &pfkey.Policy{Type: pfkey.PolicyIPsec, Dir: pfkey.DirOut, Requests: []pfkey.Request{was, is}}
	return m
}

func TestMigrate(t *testing.T) {
	r := start(t, ServerOptions{})
	x, y, c := r.stranger(), r.stranger(), r.dial()
	if _, err := c.Register(r.ctx()); err != nil {
		t.Fatal(err)
	}
	m := migrateMessage()
	m.Src.Proto, m.Dst.Proto = pfkey.AnyProto, pfkey.AnyProto
	m.Src.Addr, m.Dst.Addr = netip.AddrPortFrom(m.Src.Addr.Addr(), 0), netip.AddrPortFrom(m.Dst.Addr.Addr(), 0)
	m.KMAddress = &pfkey.KMAddress{Local: netip.MustParseAddrPort("192.0.2.1:500"), Remote: netip.MustParseAddrPort("198.51.100.2:500")}
	x.send(m)
	for _, z := range []*stranger{x, y} {
		got := z.want(pfkey.Header{Type: pfkey.XMigrate, SAType: pfkey.SATypeESP})
		want := *m
		want.Header = got.Header
		want.Src, want.Dst = &pfkey.Address{PrefixLen: 24, Addr: m.Src.Addr}, &pfkey.Address{PrefixLen: 16, Addr: m.Dst.Addr}
		if !reflect.DeepEqual(got, &want) {
			t.Errorf("announced:\n got %v\nwant %v", got, &want)
		}
		z.quiet()
	}
	wantEvent(t, c, PoliciesChanged{})
	sel := policy(1).Sel
	sel.Proto, sel.DstPort = 0, 0
	want := []*Migration{{Dir: ipsec.Out, Sel: sel, Moves: []Move{{
		Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 7, OldSrc: addr("192.0.2.1"), OldDst: addr("198.51.100.2"),
		NewSrc: addr("2001:db8::1"), NewDst: addr("2001:db8::2"),
	}}}}
	r.inServer(func() {
		if !reflect.DeepEqual(r.b.migrated, want) {
			t.Errorf("backend: got %+v, want %+v", r.b.migrated[0], want[0])
		}
		r.b.migrateErr = syscall.ENODATA
	})
	x.ask(m, uint8(syscall.ENODATA))
	y.quiet()
}

func TestMigrateMalformed(t *testing.T) {
	r := start(t, ServerOptions{})
	x := r.stranger()
	for _, tt := range []struct {
		name string
		f    func(m *pfkey.Message)
	}{
		{"no policy", func(m *pfkey.Message) { m.Policy = nil }},
		{"no source", func(m *pfkey.Message) { m.Src = nil }},
		{"two families", func(m *pfkey.Message) { m.Dst.Addr = netip.MustParseAddrPort("[::1]:0") }},
		{"type none", func(m *pfkey.Message) { m.Policy.Type, m.Policy.Requests = pfkey.PolicyNone, nil }},
		{"no direction", func(m *pfkey.Message) { m.Policy.Dir = 0 }},
		{"direction 4", func(m *pfkey.Message) { m.Policy.Dir = 4 }},
		{"no requests", func(m *pfkey.Message) { m.Policy.Requests = nil }},
		{"half a pair", func(m *pfkey.Message) { m.Policy.Requests = m.Policy.Requests[:1] }},
		{"another protocol", func(m *pfkey.Message) { m.Policy.Requests[1].Proto = 51 }},
		{"another mode", func(m *pfkey.Message) { m.Policy.Requests[1].Mode = pfkey.ModeTransport }},
		{"another reqid", func(m *pfkey.Message) { m.Policy.Requests[1].ReqID = 8 }},
		{"protocol 6", func(m *pfkey.Message) { m.Policy.Requests[0].Proto, m.Policy.Requests[1].Proto = 6, 6 }},
		{"no mode", func(m *pfkey.Message) { m.Policy.Requests[0].Mode, m.Policy.Requests[1].Mode = 0, 0 }},
		{"BEET", func(m *pfkey.Message) {
			m.Policy.Requests[0].Mode, m.Policy.Requests[1].Mode = pfkey.ModeBEET, pfkey.ModeBEET
		}},
		{"transport without addresses", func(m *pfkey.Message) {
			q := pfkey.Request{Proto: 50, Mode: pfkey.ModeTransport}
			m.Policy.Requests = []pfkey.Request{q, q}
		}},
		{"to 0.0.0.0", func(m *pfkey.Message) {
			m.Policy.Requests[1].Src, m.Policy.Requests[1].Dst = addr("0.0.0.0"), addr("1.2.3.4")
		}},
		{"to a mapped address", func(m *pfkey.Message) {
			m.Policy.Requests[1].Src, m.Policy.Requests[1].Dst = addr("::ffff:1.2.3.4"), addr("::1")
		}},
		{"twice from one place", func(m *pfkey.Message) { m.Policy.Requests = append(m.Policy.Requests, m.Policy.Requests...) }},
		{"seven pairs", func(m *pfkey.Message) {
			two := m.Policy.Requests
			m.Policy.Requests = nil
			for k := range 7 {
				was, is := two[0], two[1]
				was.ReqID, is.ReqID = uint32(k), uint32(k)
				m.Policy.Requests = append(m.Policy.Requests, was, is)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := migrateMessage()
			tt.f(m)
			x.send(m)
			x.want(pfkey.Header{Type: pfkey.XMigrate, Errno: uint8(syscall.EINVAL), Seq: 21, Pid: 22})
		})
	}
	r.inServer(func() {
		if len(r.b.migrated) != 0 {
			t.Errorf("the backend was asked: %+v", r.b.migrated)
		}
	})
}

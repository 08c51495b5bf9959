package keysock

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

func TestSARequests(t *testing.T) {
	r := start(t, ServerOptions{})
	c, ctx := r.dial(), r.ctx()

	want := Supported{Encr: alg.AllEncr(), Auth: alg.AllInteg(), Queues: 3}
	for range 2 { // EEXIST the second time is not for the caller
		if got, err := c.Register(ctx, ipsec.ESP, ipsec.AH); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("Register: got %v, %v, want %v", got, err, want)
		}
	}
	g := GetSPI{Queue: 2, Proto: ipsec.ESP, Src: addr("198.51.100.2"), Dst: addr("192.0.2.1"), Mode: ipsec.Tunnel, ReqID: 3,
		Seq: 5, Min: 0x2000, Max: 0x2fff, Encap: &ipsec.Encap{SPort: 4500, DPort: 4500}}
	spi, err := c.GetSPI(ctx, g)
	if err != nil || spi != 0x2000 {
		t.Fatalf("GetSPI: got %v, %v, want 0x2000", spi, err)
	}
	r.inServer(func() {
		if got := r.b.getSPIs[0]; !reflect.DeepEqual(got, g) {
			t.Errorf("GetSPI: backend got %+v, want %+v", got, g)
		}
	})
	_, err = c.GetSPI(ctx, g)
	wantErr(t, "second GetSPI", err, syscall.EEXIST)

	larval := ipsec.SAID{Proto: ipsec.ESP, Dst: g.Dst, SPI: spi}
	i, err := c.Get(ctx, larval, g.Src)
	if err != nil || i.State != Larval || i.EncrKey.Len() != 0 || i.Hard.AddTime != 30*time.Second {
		t.Errorf("Get of a larval SA: got %+v, %v", i, err)
	}
	p := params(spi)
	p.Dst, p.Src = g.Dst, g.Src
	wantErr(t, "Add over a larval SA", c.Add(ctx, p, 5), syscall.EEXIST)
	wantErr(t, "Update", c.Update(ctx, p, 5), nil)
	if p.EncrKey.Bytes()[1] != 0xa1 {
		t.Error("Update wiped the caller's key")
	}
	i, err = c.Get(ctx, larval, netip.Addr{})
	wantI := &SAInfo{SAParams: *p, State: Mature, Seq: 5, Packets: 1 << 33, Bytes: 1 << 40, Added: epoch, FirstUsed: epoch.Add(time.Second)}
	if err != nil || !sameSA(i, wantI) {
		t.Errorf("Get:\n got %+v, %v\nwant %+v", i, err, wantI)
	}
	q := params(0x3000)
	wantErr(t, "Add", c.Add(ctx, q, 0), nil)
	wantErr(t, "second Add", c.Add(ctx, q, 0), syscall.EEXIST)
	wantErr(t, "Update of nothing", c.Update(ctx, params(0x4000), 0), syscall.ESRCH)
	l, err := c.Dump(ctx, 0)
	if err != nil || len(l) != 2 || !sameSA(l[0], wantI) || l[1].SPI != 0x3000 {
		t.Errorf("Dump: got %v, %v", l, err)
	}
	if l, err = c.Dump(ctx, ipsec.AH); err != nil || len(l) != 0 {
		t.Errorf("Dump of AH: got %v, %v, want none", l, err)
	}
	wantErr(t, "Delete", c.Delete(ctx, q.SAID, netip.Addr{}), nil)
	wantErr(t, "second Delete", c.Delete(ctx, q.SAID, q.Src), syscall.ESRCH)
	_, err = c.Get(ctx, q.SAID, q.Src)
	wantErr(t, "Get of nothing", err, syscall.ESRCH)
	wantErr(t, "Flush", c.Flush(ctx, ipsec.ESP), nil)
	wantErr(t, "second Flush", c.Flush(ctx, 0), nil)
	if l, err = c.Dump(ctx, 0); err != nil || len(l) != 0 {
		t.Errorf("Dump after Flush: got %v, %v, want none", l, err)
	}
	wantErr(t, "AcquireFailed", c.AcquireFailed(ctx, 77, syscall.ETIMEDOUT), nil)
	if _, err := c.Status(ctx); err != nil {
		t.Fatal(err)
	}
	r.inServer(func() {
		if !reflect.DeepEqual(r.b.failed, []uint32{77}) {
			t.Errorf("AcquireFailed: backend got %v, want 77", r.b.failed)
		}
	})
	comp := ipsec.SAID{Proto: ipsec.IPComp, Dst: q.Dst, SPI: 300}
	wantErr(t, "Add of IPComp", c.Add(ctx, &ipsec.SAParams{SAID: comp, Src: q.Src, Mode: ipsec.Tunnel, ReqID: 5}, 0), nil)
	if i, err := c.Get(ctx, comp, q.Src); err != nil || i.SAID != comp || i.Mode != ipsec.Tunnel || i.ReqID != 5 || i.State != Mature || i.Encr != alg.EncrNone {
		t.Errorf("Get of IPComp: got %+v, %v", i, err)
	}
	wantErr(t, "Add without addresses", c.Add(ctx, &ipsec.SAParams{SAID: ipsec.SAID{Proto: ipsec.ESP}}, 0), syscall.EINVAL)
}

func TestPolicyRequests(t *testing.T) {
	r := start(t, ServerOptions{})
	c, ctx := r.dial(), r.ctx()
	p := policy(1)
	got, err := c.AddPolicy(ctx, p)
	if err != nil {
		t.Fatal(err)
	}
	want := *p
	want.ID = 1
	want.Requests = []ipsec.Request{p.Requests[0]}
	want.Requests[0].ReqID = 0x4001
	if !reflect.DeepEqual(*got, want) {
		t.Errorf("AddPolicy:\n got %+v\nwant %+v", *got, want)
	}
	_, err = c.AddPolicy(ctx, p)
	wantErr(t, "second AddPolicy", err, syscall.EEXIST)
	p.Priority = 7
	if got, err = c.UpdatePolicy(ctx, p); err != nil || got.ID != 1 || got.Priority != 7 {
		t.Errorf("UpdatePolicy: got %+v, %v", got, err)
	}
	if got, err = c.UpdatePolicy(ctx, policy(2)); err != nil || got.ID != 2 {
		t.Errorf("UpdatePolicy of a new one: got %+v, %v", got, err)
	}
	i, err := c.GetPolicy(ctx, 1)
	if err != nil || i.Priority != 7 || !i.Added.Equal(epoch) {
		t.Errorf("GetPolicy: got %+v, %v", i, err)
	}
	l, err := c.DumpPolicies(ctx)
	if err != nil || len(l) != 2 || !reflect.DeepEqual(l[1].Proposals, p.Proposals) {
		t.Errorf("DumpPolicies: got %v, %v", l, err)
	}
	wantErr(t, "DeletePolicy", c.DeletePolicy(ctx, p.Dir, p.Sel), nil)
	wantErr(t, "second DeletePolicy", c.DeletePolicy(ctx, p.Dir, p.Sel), syscall.ENOENT)
	wantErr(t, "DeletePolicyID", c.DeletePolicyID(ctx, 2), nil)
	wantErr(t, "second DeletePolicyID", c.DeletePolicyID(ctx, 2), syscall.ENOENT)
	_, err = c.GetPolicy(ctx, 1)
	wantErr(t, "GetPolicy of nothing", err, syscall.ENOENT)
	if l, err = c.DumpPolicies(ctx); err != nil || len(l) != 0 {
		t.Errorf("DumpPolicies: got %v, %v, want none", l, err)
	}
	wantErr(t, "FlushPolicies", c.FlushPolicies(ctx), nil)
	_, err = c.AddPolicy(ctx, &ipsec.Policy{Dir: ipsec.Out, Sel: p.Sel, Action: ipsec.Protect})
	wantErr(t, "policy without requests", err, syscall.EINVAL)
}

func TestTransaction(t *testing.T) {
	r := start(t, ServerOptions{})
	c, other, ctx := r.dial(), r.dial(), r.ctx()
	x := r.stranger()
	wantErr(t, "Commit of nothing", c.Commit(ctx), syscall.EINVAL)
	wantErr(t, "Begin", c.Begin(ctx), nil)
	wantErr(t, "second Begin", c.Begin(ctx), syscall.EBUSY)
	for n := range byte(3) {
		if _, err := c.AddPolicy(ctx, policy(n)); err != nil {
			t.Fatal(err)
		}
	}
	if l, err := other.DumpPolicies(ctx); err != nil || len(l) != 0 {
		t.Errorf("others see %v, %v before Commit", l, err)
	}
	if l, err := c.DumpPolicies(ctx); err != nil || len(l) != 3 {
		t.Errorf("Dump in the transaction: got %v, %v, want 3", l, err)
	}
	x.quiet()
	wantErr(t, "Commit", c.Commit(ctx), nil)
	wantEvent(t, other, PoliciesChanged{})
	for n := range 3 {
		if m := x.recv(); m.Type != pfkey.XSPDAdd || m.Policy.ID != uint32(n+1) || m.Proposal != nil {
			t.Errorf("stranger got %v", m)
		}
	}
	if l, err := other.DumpPolicies(ctx); err != nil || len(l) != 3 {
		t.Errorf("others see %v, %v after Commit, want 3", l, err)
	}
	wantErr(t, "Begin", c.Begin(ctx), nil)
	wantErr(t, "FlushPolicies", c.FlushPolicies(ctx), nil)
	wantErr(t, "Abort", c.Abort(ctx), nil)
	wantErr(t, "Begin", c.Begin(ctx), nil)
	wantErr(t, "FlushPolicies", c.FlushPolicies(ctx), nil)
	c.Close()
	// The connection's end aborts.
	for end := time.Now().Add(time.Minute); ; {
		var n int
		r.inServer(func() { n = len(r.b.aborted) })
		if n == 2 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("aborted %d times, want 2", n)
		}
	}
	if l, err := other.DumpPolicies(ctx); err != nil || len(l) != 3 {
		t.Errorf("after aborts: got %v, %v, want 3", l, err)
	}
	x.quiet()
}

// A server that ends aborts what is open.
func TestServerEndAborts(t *testing.T) {
	r := start(t, ServerOptions{})
	c := r.dial()
	wantErr(t, "Begin", c.Begin(r.ctx()), nil)
	r.stop()
	if len(r.b.aborted) != 1 {
		t.Errorf("aborted %v, want one", r.b.aborted)
	}
	wantErr(t, "request after the end", c.Flush(r.ctx(), 0), ErrClosed)
	if _, ok := <-c.Events(); ok {
		t.Error("Events is not closed")
	}
}

func TestStatus(t *testing.T) {
	r := start(t, ServerOptions{})
	c := r.dial()
	for _, n := range []int{0, 1, statusPart - 2, statusPart - 1, 5 * statusPart} {
		doc := append(append([]byte{'"'}, bytes.Repeat([]byte{'x'}, n)...), '"')
		r.inServer(func() { r.b.status = doc })
		got, err := c.Status(r.ctx())
		if err != nil || !bytes.Equal(got, doc) || !json.Valid(got) {
			t.Errorf("document of %d octets: got %d, %v", len(doc), len(got), err)
		}
	}
}

func TestAddresses(t *testing.T) {
	r := start(t, ServerOptions{})
	c, x := r.dial(), r.stranger()
	four, six := netip.MustParsePrefix("10.9.8.7/32"), netip.MustParsePrefix("2001:db8::7/64")
	for _, p := range []netip.Prefix{four, six} {
		if err := c.AddAddress(r.ctx(), p); err != nil {
			t.Errorf("add %v: %v", p, err)
		}
	}
	if err := c.DeleteAddress(r.ctx(), four); err != nil {
		t.Error(err)
	}
	if err := c.DeleteAddress(r.ctx(), four); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("delete what is not there: %v, want ENOENT", err)
	}
	r.inServer(func() {
		if !slices.Equal(r.b.addrs, []netip.Prefix{six}) {
			t.Errorf("got %v, want %v", r.b.addrs, six)
		}
	})
	for _, bad := range []string{"0.0.0.0/32", "224.0.0.1/32", "127.0.0.1/8", "::1/128", "10.0.0.1/0", "::ffff:10.0.0.1/128"} {
		if err := c.AddAddress(r.ctx(), netip.MustParsePrefix(bad)); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("add %s: %v, want EINVAL", bad, err)
		}
	}
	if err := c.AddAddress(r.ctx(), netip.Prefix{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("add nothing: %v, want EINVAL", err)
	}
	x.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.XAddrAdd}}, uint8(syscall.EINVAL))
}

func TestEvents(t *testing.T) {
	r := start(t, ServerOptions{})
	c, deaf, ctx := r.dial(), r.dial(), r.ctx()
	x := r.stranger()
	if r.s.Acquire(Acquire{Seq: 1, Proto: ipsec.ESP, Src: addr("192.0.2.1"), Dst: addr("192.0.2.2")}, 0) {
		t.Error("Acquire: true with nobody registered")
	}
	if _, err := c.Register(ctx, ipsec.AH); err != nil {
		t.Fatal(err)
	}
	x.register()
	a := Acquire{
		Seq: 9, Proto: ipsec.ESP, Src: addr("192.0.2.1"), Dst: addr("198.51.100.2"), PolicyID: 4, Priority: 5,
		Mode: ipsec.Tunnel, ReqID: 0x4001, Proposals: policy(1).Proposals,
		Flow: &ipsec.Flow{Src: addr("10.1.0.1"), Dst: addr("10.2.0.1"), Proto: 6, SrcPort: 1, DstPort: 2},
	}
	if !r.s.Acquire(a, 0) {
		t.Error("Acquire: false")
	}
	i := &SAInfo{SAParams: *params(0x1000)}
	r.s.Expire(i, false)
	r.s.Expire(i, true)
	n := NewMapping{SAID: i.SAID, Seq: 9, Mode: ipsec.Tunnel, ReqID: 7,
		Old: netip.MustParseAddrPort("192.0.2.1:4500"), New: netip.MustParseAddrPort("192.0.2.9:1025")}
	r.s.NewMapping(n)
	wantEvent(t, c, a)
	wantEvent(t, c, Expire{i.SAID, i.Src, i.Mode, i.ReqID, false})
	wantEvent(t, c, Expire{i.SAID, i.Src, i.Mode, i.ReqID, true})
	wantEvent(t, c, n)

	m := x.want(pfkey.Header{Type: pfkey.Acquire, SAType: pfkey.SATypeESP, Seq: 9})
	if m.Flow != nil || m.Policy.ID != 4 || len(m.Proposal.Combs) != 3 || m.SA2.ReqID != 0x4001 || m.Src.PrefixLen != 32 {
		t.Errorf("stranger's ACQUIRE: got %v", m)
	}
	m = x.want(pfkey.Header{Type: pfkey.Expire, SAType: pfkey.SATypeESP})
	if m.Soft == nil || m.Hard != nil || m.Current == nil || m.SA.State != pfkey.StateDying || m.EncrKey != nil || m.NATT == nil || m.NATTDPort.Port != 1024 {
		t.Errorf("stranger's soft EXPIRE: got %v", m)
	}
	m = x.want(pfkey.Header{Type: pfkey.Expire, SAType: pfkey.SATypeESP})
	if m.Hard == nil || m.Soft != nil || m.SA.State != pfkey.StateDead || m.Hard.AddTime != 3600 {
		t.Errorf("stranger's hard EXPIRE: got %v", m)
	}
	m = x.want(pfkey.Header{Type: pfkey.XNATTNewMapping, SAType: pfkey.SATypeESP, Seq: 9})
	if m.Src.Addr.Addr() != n.Old.Addr() || m.NATTDPort.Port != 1025 || m.SADst != nil {
		t.Errorf("stranger's X_NAT_T_NEW_MAPPING: got %v", m)
	}
	select {
	case e := <-deaf.Events():
		t.Errorf("client that did not register got %+v", e)
	default:
	}
	// Whom nobody hears any more is not registered.
	c.Close()
	x.nc.Close()
	for end := time.Now().Add(time.Minute); r.s.Stats().Conns > 1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections, want the one that is open", r.s.Stats().Conns)
		}
	}
	if r.s.Acquire(a, 0) {
		t.Error("Acquire: true after the registered ones are closed")
	}
}

// The engine is told who hears events, once for each socket, and may ask it alone;
// that follows the answer to REGISTER.
func TestAudience(t *testing.T) {
	r := start(t, ServerOptions{})
	a := Acquire{Proto: ipsec.ESP, Src: addr("192.0.2.1"), Dst: addr("198.51.100.2"), PolicyID: 4, Mode: ipsec.Tunnel, ReqID: 7}
	came, last := 0, uint64(0)
	r.inServer(func() {
		r.b.registered = func(conn uint64) {
			came++
			a.Seq, last = uint32(came), conn
			if !r.s.Acquire(a, conn) {
				t.Errorf("connection %d does not hear", conn)
			}
		}
	})
	x := r.stranger()
	register := func(st pfkey.SAType, errno syscall.Errno) {
		t.Helper()
		x.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Register, SAType: st, Seq: 1, Pid: 50}}, uint8(errno))
	}
	register(pfkey.SATypeUnspec, 0) // only asks
	register(pfkey.SATypeESP, 0)
	x.want(pfkey.Header{Type: pfkey.Acquire, SAType: pfkey.SATypeESP, Seq: 1})
	register(pfkey.SATypeAH, 0)
	register(pfkey.SATypeAH, syscall.EEXIST)
	c := r.dial()
	if _, err := c.Register(r.ctx(), ipsec.ESP, ipsec.AH); err != nil {
		t.Fatal(err)
	}
	if e, ok := nextEvent(t, c).(Acquire); !ok || e.Seq != 2 {
		t.Errorf("got %+v, want number 2", e)
	}
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Get, SAType: pfkey.SATypeESP}})
	for m := x.recv(); m.Type != pfkey.Get; m = x.recv() {
		if m.Type != pfkey.Register { // by c
			t.Errorf("got %+v", m.Header)
		}
	}
	r.inServer(func() {
		if came != 2 || r.s.Acquire(a, last+1) {
			t.Errorf("%d came, or who has not registered hears", came)
		}
	})
}

// What one client does, others hear once, with its seq and pid, without keys;
// questions and errors they do not hear.
func TestWhoHears(t *testing.T) {
	r := start(t, ServerOptions{})
	c, other, ctx := r.dial(), r.dial(), r.ctx()
	x := r.stranger()
	x.quiet()
	p := params(0x1000)
	for _, err := range []error{c.Add(ctx, p, 0), c.Update(ctx, p, 0)} {
		if err != nil {
			t.Fatal(err)
		}
		m := x.recv()
		if m.Pid != c.pid || m.Errno != 0 || m.EncrKey != nil || m.AuthKey != nil || m.SAMore != nil || m.TSSrc != nil {
			t.Errorf("stranger got %v", m)
		}
		wantEvent(t, other, SAAdded{p.SAID, p.Src, p.Mode, p.ReqID})
	}
	c.Add(ctx, p, 0) // EEXIST
	c.Get(ctx, p.SAID, p.Src)
	c.Dump(ctx, 0)
	c.GetSPI(ctx, GetSPI{Proto: ipsec.ESP, Src: p.Src, Dst: p.Dst})
	c.DumpPolicies(ctx)
	x.quiet()
	if err := c.Delete(ctx, p.SAID, p.Src); err != nil {
		t.Fatal(err)
	}
	if m := x.recv(); m.Type != pfkey.Delete || m.SA.State != pfkey.StateDead {
		t.Errorf("stranger got %v", m)
	}
	wantEvent(t, other, SADeleted{p.SAID, p.Src})
	got, err := c.AddPolicy(ctx, policy(1))
	if err != nil {
		t.Fatal(err)
	}
	if m := x.recv(); m.Type != pfkey.XSPDAdd || m.Policy.ID != 1 || m.Proposal != nil || m.Src.Proto != m.Dst.Proto {
		t.Errorf("stranger got %v", m)
	}
	wantEvent(t, other, PolicyAdded{*got})
	wantErr(t, "DeletePolicyID", c.DeletePolicyID(ctx, 1), nil)
	if m := x.recv(); m.Type != pfkey.XSPDDelete2 {
		t.Errorf("stranger got %v", m)
	}
	wantEvent(t, other, PolicyDeleted{*got})
	// Nothing there: heard by the sender alone.
	c.FlushPolicies(ctx)
	x.quiet()
	c.AddPolicy(ctx, policy(1))
	c.Flush(ctx, 0) // the larval SA
	c.FlushPolicies(ctx)
	nextEvent(t, other)
	wantEvent(t, other, SAsFlushed{})
	wantEvent(t, other, PoliciesFlushed{})
	for _, want := range []pfkey.MsgType{pfkey.XSPDAdd, pfkey.Flush, pfkey.XSPDFlush} {
		if m := x.recv(); m.Type != want {
			t.Errorf("stranger got %v, want %v", m, want)
		}
	}
	// The sender of a FLUSH that removed something hears it twice.
	x.send(addMessage(0x5000))
	x.recv()
	h := pfkey.Header{Type: pfkey.Flush, Seq: 3, Pid: 4}
	x.ask(&pfkey.Message{Header: h}, 0)
	x.want(h)
	x.quiet()
	select {
	case e := <-c.Events():
		if _, ok := e.(SAAdded); !ok {
			t.Errorf("own request made event %+v", e)
		}
	case <-time.After(time.Minute):
		t.Error("no event")
	}
}

// addMessage is an ADD as a stranger sends it.
func addMessage(spi uint32) *pfkey.Message {
	a := func(s string) *pfkey.Address {
		return &pfkey.Address{Proto: 255, Addr: netip.MustParseAddrPort(s)}
	}
	return &pfkey.Message{
		Header: pfkey.Header{Type: pfkey.Add, SAType: pfkey.SATypeESP, Seq: 3, Pid: 4},
		SA:     &pfkey.SA{SPI: spi, Replay: 4, Encrypt: pfkey.EncrAESCBC, Auth: pfkey.AuthHMACSHA1, Flags: pfkey.FlagXCyclicSeq},
		Src:    a("192.0.2.1:500"), Dst: a("192.0.2.2:500"),
		EncrKey: pfkey.NewKey(make([]byte, 16)), AuthKey: pfkey.NewKey(make([]byte, 20)),
	}
}

func TestRegisterSemantics(t *testing.T) {
	r := start(t, ServerOptions{})
	x, y, z := r.stranger(), r.stranger(), r.stranger()
	reg := func(t pfkey.SAType, seq uint32) *pfkey.Message {
		return &pfkey.Message{Header: pfkey.Header{Type: pfkey.Register, SAType: t, Seq: seq, Pid: 7}}
	}
	m := x.ask(reg(pfkey.SATypeUnspec, 1), 0)
	if m.SupportedAuth == nil || m.SupportedEncr == nil || len(m.SupportedEncr.Algs) != len(alg.AllEncr()) {
		t.Errorf("got %v", m)
	}
	r.s.Expire(&SAInfo{SAParams: *params(0x1000)}, true)
	x.quiet() // SA type 0 registers nothing
	x.ask(reg(pfkey.SATypeESP, 2), 0)
	x.ask(reg(pfkey.SATypeESP, 3), 17)
	x.ask(reg(pfkey.SATypeAH, 4), 0)
	x.ask(reg(10, 5), 22)
	x.ask(reg(9, 6), 0)
	y.ask(reg(pfkey.SATypeAH, 8), 0)
	x.want(pfkey.Header{Type: pfkey.Register, SAType: pfkey.SATypeAH, Seq: 8, Pid: 7})
	z.quiet()
	// Registered for AH, y hears of ESP.
	r.s.Expire(&SAInfo{SAParams: *params(0x1000)}, true)
	y.want(pfkey.Header{Type: pfkey.Expire, SAType: pfkey.SATypeESP})
	z.quiet()
}

func TestPromiscuous(t *testing.T) {
	r := start(t, ServerOptions{})
	x, y := r.stranger(), r.stranger()
	y.quiet()
	on := pfkey.Header{Type: pfkey.XPromisc, SAType: 1, Seq: 1, Pid: 8}
	x.ask(&pfkey.Message{Header: on}, 0)
	x.want(on) // the promiscuous copy of the echo, as on Linux
	y.want(on) // echoed to all
	bad := on
	bad.SAType = 2
	x.send(&pfkey.Message{Header: bad})
	x.want(bad) // its own request
	bad.Errno = 22
	first, second := x.recv(), x.recv() // the answer and its copy
	if first.Header != bad || second.Header != bad {
		t.Errorf("got %v, %v", first, second)
	}
	add := addMessage(0x5000)
	add.EncrKey = pfkey.NewKey(bytes.Repeat([]byte{7}, 16))
	y.ask(add, 0)
	m := x.want(add.Header)
	if m.EncrKey == nil || !bytes.Equal(m.EncrKey.Key, add.EncrKey.Key) {
		t.Errorf("promiscuous socket got %v, want the request as sent", m)
	}
	for range 2 { // the copy for all, and the promiscuous one
		if m = x.want(add.Header); m.EncrKey != nil || m.Current == nil {
			t.Errorf("promiscuous socket got %v, want the answer", m)
		}
	}
	get := pfkey.Message{Header: pfkey.Header{Type: pfkey.Get, SAType: 3, Seq: 11, Pid: 12}, SA: add.SA, Src: add.Src, Dst: add.Dst}
	y.ask(&get, 0)
	x.want(get.Header)
	if m = x.want(get.Header); m.EncrKey == nil || m.EncrKey.Key[0] != 7 {
		t.Errorf("promiscuous socket got %v, want keys", m)
	}
	y.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, Pid: 12}})
	y.want(pfkey.Header{Type: pfkey.Dump, SAType: 3, Pid: 12})
	x.want(pfkey.Header{Type: pfkey.Dump, Pid: 12})
	x.want(pfkey.Header{Type: pfkey.Dump, SAType: 3, Pid: 12})
	r.s.Expire(&SAInfo{SAParams: *params(0x1000)}, true)
	x.want(pfkey.Header{Type: pfkey.Expire, SAType: 3})
	// A longer X_PROMISC is passed on as it is.
	h := pfkey.Header{Type: pfkey.XPromisc, SAType: 3, Seq: 9, Pid: 9}
	y.ask(&pfkey.Message{Header: h, SA2: &pfkey.SA2{ReqID: 5}}, 0)
	for range 3 { // the request, the copy for all, and the promiscuous one
		if m = x.want(h); m.SA2 == nil || m.SA2.ReqID != 5 {
			t.Errorf("got %v", m)
		}
	}
	off := pfkey.Header{Type: pfkey.XPromisc, Seq: 2, Pid: 8}
	x.send(&pfkey.Message{Header: off})
	x.want(off) // the copy of its own request, then the answer
	x.want(off)
	y.want(off)
	y.quiet()
	x.quiet()
}

// SAs in a transaction: the client hears at once, everybody else at its end, and
// of one that was aborted never.
func TestTransactionSAs(t *testing.T) {
	r := start(t, ServerOptions{})
	c, ctx, x := r.dial(), r.ctx(), r.stranger()
	for _, commit := range []bool{false, true} {
		wantErr(t, "Begin", c.Begin(ctx), nil)
		p := params(0x1234)
		wantErr(t, "Add", c.Add(ctx, p, 0), nil)
		wantErr(t, "Add again", c.Add(ctx, p, 0), syscall.EEXIST)
		wantErr(t, "Update", c.Update(ctx, p, 0), nil)
		wantErr(t, "Delete of none", c.Delete(ctx, ipsec.SAID{Proto: ipsec.ESP, Dst: p.Dst, SPI: 0x999}, p.Src), syscall.ESRCH)
		wantErr(t, "Delete", c.Delete(ctx, p.SAID, p.Src), nil)
		x.quiet()
		if !commit {
			wantErr(t, "Abort", c.Abort(ctx), nil)
			continue
		}
		wantErr(t, "Commit", c.Commit(ctx), nil)
		for _, want := range []pfkey.MsgType{pfkey.Add, pfkey.Update, pfkey.Delete} {
			if m := x.recv(); m.Type != want || m.SA == nil || m.SA.SPI != 0x1234 || m.EncrKey != nil || m.AuthKey != nil {
				t.Errorf("stranger got %v, want %v without keys", m, want)
			}
		}
	}
}

// Who opted in is told of a policy whose life has ended, in full.
func TestPolicyExpired(t *testing.T) {
	r := start(t, ServerOptions{})
	c, x := r.dial(), r.stranger()
	x.register()
	p, err := c.AddPolicy(r.ctx(), policy(1))
	if err != nil {
		t.Fatal(err)
	}
	if m := x.recv(); m.Type != pfkey.XSPDAdd {
		t.Errorf("stranger got %v", m)
	}
	r.inServer(func() { r.s.PolicyExpired(&PolicyInfo{Policy: *p}) })
	if e, ok := nextEvent(t, c).(PolicyDeleted); !ok || e.Policy.ID != p.ID || e.Policy.Sel != p.Sel || e.Policy.Dir != p.Dir {
		t.Errorf("got %+v", e)
	}
	x.quiet()
}

// A client moves one SA; the others hear of it as of an update.
func TestMoveSA(t *testing.T) {
	r := start(t, ServerOptions{})
	c := r.dial()
	p := &ipsec.SAParams{
		SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: addr("192.0.2.2"), SPI: 0x1000}, Src: addr("192.0.2.1"), Mode: ipsec.Tunnel,
		Encr: alg.EncrAESGCM16, EncrKey: ipsec.NewKey(make([]byte, 20)), Encap: &ipsec.Encap{SPort: 4500, DPort: 1024},
	}
	if err := c.Add(r.ctx(), p, 0); err != nil {
		t.Fatal(err)
	}
	was := p.SAID
	p.Dst, p.Encap = addr("203.0.113.7"), &ipsec.Encap{SPort: 4500, DPort: 2048}
	p.Home = &ipsec.Ends{Src: addr("192.0.2.1"), Dst: addr("192.0.2.2")}
	if err := c.Move(r.ctx(), was, p); err != nil {
		t.Fatal(err)
	}
	if i, err := c.Get(r.ctx(), p.SAID, p.Src); err != nil || i.Encap.DPort != 2048 || i.Home == nil || *i.Home != *p.Home {
		t.Errorf("at the new place: %+v, %v", i, err)
	}
	for _, bad := range []ipsec.Ends{{Src: p.Home.Src, Dst: addr("2001:db8::1")}, {Src: addr("0.0.0.0"), Dst: p.Dst}, {Src: p.Src, Dst: addr("::ffff:1.2.3.4")}} {
		q := *p
		q.Home = &bad
		if err := c.Move(r.ctx(), p.SAID, &q); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("known by %v: %v, want EINVAL", bad, err)
		}
	}
	q := *p
	q.SPI, q.Mode = 0x1001, ipsec.Transport
	if err := c.Add(r.ctx(), &q, 0); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("transport mode away from home: %v, want EINVAL", err)
	}
	if _, err := c.Get(r.ctx(), was, p.Src); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("at the old place: %v, want ESRCH", err)
	}
	if err := c.Move(r.ctx(), was, p); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("again: %v, want ESRCH", err)
	}
	if err := c.Move(r.ctx(), ipsec.SAID{}, p); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("from nowhere: %v, want EINVAL", err)
	}
}

package keyengine

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

var _ Server = (*keysock.Server)(nil)

// next returns the next event, which has to be a T.
func next[T keysock.Event](t *testing.T, c *keysock.Client) T {
	t.Helper()
	for {
		select {
		case e, ok := <-c.Events():
			if !ok {
				t.Fatal("the connection has ended")
			}
			if v, ok := e.(T); ok {
				return v
			}
			t.Fatalf("got %#v, want %T", e, *new(T))
		case <-time.After(time.Minute):
			t.Fatalf("no %T", *new(T))
		}
	}
}

// Through a real socket: loadConfig's transaction, a packet, ike's negotiation,
// expiry by traffic and by time.
func TestThroughSocket(t *testing.T) {
	installed := make(chan sad.OutKey, 10)
	e, _, path := serve(t, Options{
		Installed: func(k sad.OutKey) { installed <- k },
		Status:    func() ([]byte, error) { return []byte(`{"up":true}`), nil },
	})
	ctx := t.Context()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dial := func() *keysock.Client {
		c, err := keysock.Dial(ctx, path)
		ok(err)
		return c
	}

	load, ike := dial(), dial()
	defer ike.Close()
	sup, err := ike.Register(ctx, ipsec.ESP)
	ok(err)
	if len(sup.Encr) == 0 || len(sup.Auth) == 0 {
		t.Errorf("got %+v", sup)
	}
	ok(load.Begin(ctx))
	p, err := load.AddPolicy(ctx, tunnel(ipsec.LevelUnique, 0))
	ok(err)
	if e.o.SPD.Len() != 0 {
		t.Error("the draft is in force")
	}
	if err := ike.FlushPolicies(ctx); err != nil { // nothing there, no harm
		t.Error(err)
	}
	ok(load.Commit(ctx))
	if p.ID == 0 || p.Requests[0].ReqID != 0x4000 {
		t.Errorf("got %+v", p)
	}
	load.Close()
	next[keysock.PoliciesChanged](t, ike)

	// The packet.
	entry := e.o.SPD.Edit().Get(p.ID)
	if entry == nil {
		t.Fatal("the policy has gone with its client")
	}
	r := entry.P.Requests[0]
	k := sad.OutKey{Proto: r.Proto, Mode: r.Mode, ReqID: r.ReqID, Src: r.Src, Dst: r.Dst}
	e.NeedSA(entry, k, flow)
	e.NeedSA(entry, k, flow)
	a := next[keysock.Acquire](t, ike)
	if a.PolicyID != p.ID || a.ReqID != 0x4000 || a.Src != self || a.Dst != peer || a.Mode != ipsec.Tunnel || len(a.Proposals) != 1 || a.Flow == nil || *a.Flow != flow {
		t.Errorf("got %+v", a)
	}

	// The negotiation.
	spi, err := ike.GetSPI(ctx, keysock.GetSPI{Proto: ipsec.ESP, Src: peer, Dst: self, Mode: ipsec.Tunnel, ReqID: a.ReqID, Seq: a.Seq})
	ok(err)
	in := outSA(spi, a.ReqID)
	in.Src, in.Dst = peer, self
	ok(ike.Update(ctx, in, a.Seq))
	out := outSA(0xabcdef01, a.ReqID)
	out.Soft.Packets, out.Hard.Packets, out.ESN = 1, 2, true
	out.SrcTS = []ipsec.TrafficSelector{{Start: netip.MustParseAddr("10.1.0.0"), End: netip.MustParseAddr("10.1.255.255"), PortHi: 65535}}
	ok(ike.Add(ctx, out, a.Seq))
	for want := 4; want > 0; want-- { // two of each SA
		select {
		case <-installed:
		case <-time.After(time.Minute):
			t.Fatal("the data path was not told")
		}
	}
	got, err := ike.Get(ctx, out.SAID, out.Src)
	ok(err)
	if !got.EncrKey.Equal(key(20)) || got.State != keysock.Mature || !got.ESN || len(got.SrcTS) != 1 {
		t.Errorf("got %+v", got)
	}
	if l, err := ike.Dump(ctx, ipsec.ESP); err != nil || len(l) != 2 {
		t.Errorf("dump: %d, %v", len(l), err)
	}

	// Expiry.
	sa := e.o.SAD.Out(k, nil)
	if sa == nil || sa.P.SPI != out.SPI {
		t.Fatalf("outbound: got %v", sa)
	}
	for range 3 {
		if soft, hard := sa.Account(1, 100, time.Now()); soft || hard {
			e.LimitReached(sa, hard)
		}
	}
	if x := next[keysock.Expire](t, ike); x.Hard || x.SAID != out.SAID || x.ReqID != a.ReqID {
		t.Errorf("got %+v, want soft", x)
	}
	if x := next[keysock.Expire](t, ike); !x.Hard || x.SAID != out.SAID {
		t.Errorf("got %+v, want hard", x)
	}
	if _, err := ike.Get(ctx, out.SAID, out.Src); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("got %v, want ESRCH", err)
	}
	in.Soft.AddTime = time.Second
	in.EncrKey = key(20)
	ok(ike.Update(ctx, in, 0))
	if x := next[keysock.Expire](t, ike); x.Hard || x.SAID != in.SAID {
		t.Errorf("got %+v, want soft by time", x)
	}

	// Failure, and what goes with whom.
	e.NeedSA(entry, k, flow)
	a = next[keysock.Acquire](t, ike)
	ok(ike.AcquireFailed(ctx, a.Seq, syscall.ETIMEDOUT))
	if err := ike.Add(ctx, in, 0); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("got %v, want EEXIST", err)
	}
	if st, err := ike.Status(ctx); err != nil {
		t.Error(err)
	} else {
		var v struct{ Up bool }
		if json.Unmarshal(st, &v) != nil || !v.Up {
			t.Errorf("status: got %s", st)
		}
	}
	ok(ike.Flush(ctx, 0))
	if l, err := ike.DumpPolicies(ctx); err != nil || len(l) != 1 || l[0].Requests[0].ReqID != 0x4000 {
		t.Errorf("policies: %v, %v", l, err)
	}
	if e.o.SAD.Len() != 0 {
		t.Error("SAs after FLUSH")
	}
	// A connection that ends with a transaction open aborts it.
	tx := dial()
	ok(tx.Begin(ctx))
	ok(tx.FlushPolicies(ctx))
	tx.Close()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		c := dial()
		err := c.Begin(ctx)
		if err == nil {
			err = c.Abort(ctx)
		}
		c.Close()
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(end) {
			t.Fatal(err)
		}
	}
	if e.o.SPD.Len() != 1 {
		t.Error("the aborted transaction had an effect")
	}
}

// A key daemon that dies in the middle of a negotiation leaves it to the next one, and
// a larval SA to time.
func TestKeyDaemonDies(t *testing.T) {
	e, s, path, installed := engineAt(t)
	ctx := t.Context()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dial := func() *keysock.Client {
		c, err := keysock.Dial(ctx, path)
		ok(err)
		_, err = c.Register(ctx, ipsec.ESP, ipsec.AH)
		ok(err)
		return c
	}
	one := dial()
	p, err := one.AddPolicy(ctx, tunnel(ipsec.LevelUnique, 7))
	ok(err)
	s.Do(func() {
		e.NeedSA(e.o.SPD.Edit().Get(p.ID), sad.OutKey{Proto: ipsec.ESP, Mode: ipsec.Tunnel, ReqID: 7, Src: self, Dst: peer}, flow)
	})
	a := next[keysock.Acquire](t, one)
	first, err := one.GetSPI(ctx, keysock.GetSPI{Proto: ipsec.ESP, Src: peer, Dst: self, Mode: ipsec.Tunnel, ReqID: 7, Seq: a.Seq})
	ok(err)
	one.Close()

	two := dial()
	defer two.Close()
	if b := next[keysock.Acquire](t, two); !reflect.DeepEqual(a, b) {
		t.Errorf("got %+v, was %+v", b, a)
	}
	spi, err := two.GetSPI(ctx, keysock.GetSPI{Proto: ipsec.ESP, Src: peer, Dst: self, Mode: ipsec.Tunnel, ReqID: 7, Seq: a.Seq})
	ok(err)
	if spi == first {
		t.Errorf("SPI %v twice", spi)
	}
	ok(two.Add(ctx, outSA(0x1000, 7), a.Seq))
	select {
	case <-installed:
	case <-time.After(time.Minute):
		t.Fatal("the data path was not told")
	}
	if n := e.Stats().Acquires; n != 0 {
		t.Errorf("%d ACQUIREs outstanding", n)
	}
}

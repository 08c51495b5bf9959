package keyengine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

var (
	self, peer   = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.2")
	self6, peer6 = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
)

// serve runs an engine with empty databases behind a real socket until the test ends.
func serve(t testing.TB, o Options) (e *Engine, s *keysock.Server, path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "ke") // short: a socket's name has 107 octets
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "eth0.pfkey")
	o.SAD, o.SPD = sad.NewDB(), spd.NewDB()
	e = New(o)
	if s, err = keysock.NewServer(path, e, keysock.ServerOptions{}); err != nil {
		t.Fatal(err)
	}
	e.Attach(s)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Serve(ctx); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() { e.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		e.Close()
		os.RemoveAll(dir)
	})
	return e, s, path
}

// rig is an engine with a fake server and a log of all that it does. It runs
// in a synctest bubble, so that its clock is the test's.
type rig struct {
	*testing.T
	*Engine
	mu         sync.Mutex // stands for the request goroutine
	registered bool
	log        []string
	divertErr  error
	mtu        int // of the TAP
	acquires   []keysock.Acquire
	expires    []*keysock.SAInfo
}

func (r *rig) Do(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

func (r *rig) note(format string, args ...any) { r.log = append(r.log, fmt.Sprintf(format, args...)) }

func (r *rig) Acquire(a keysock.Acquire, conn uint64) bool {
	if r.registered {
		to := ""
		if conn > 0 {
			to = fmt.Sprintf(" of %d", conn)
		}
		r.note("acquire %v->%v reqid %d%s", a.Src, a.Dst, a.ReqID, to)
		r.acquires = append(r.acquires, a)
	}
	return r.registered
}

func (r *rig) Expire(i *keysock.SAInfo, hard bool) {
	kind := "soft"
	if hard {
		kind = "hard"
	}
	r.note("%s expire %v %v", kind, i.SPI, sad.State(i.State))
	r.expires = append(r.expires, i)
}

func (r *rig) NewMapping(m keysock.NewMapping) { r.note("mapping %v to %v", m.Old, m.New) }

func (r *rig) PolicyExpired(i *keysock.PolicyInfo) { r.note("policy %d expired", i.ID) }

func testRig(t *testing.T, f func(r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{T: t, registered: true, mtu: 1500}
		r.Engine = New(Options{
			SAD: sad.NewDB(), SPD: spd.NewDB(),
			Installed: func(k sad.OutKey) { r.note("installed %v->%v reqid %d", k.Src, k.Dst, k.ReqID) },
			Failed:    func(k sad.OutKey) { r.note("failed %v->%v reqid %d", k.Src, k.Dst, k.ReqID) },
			Removed:   func(s *sad.SA) { r.note("removed %v", s.P.SPI) },
			Overhead: func() {
				if was := r.mtu; was != r.InnerMTU(1500) {
					r.mtu = r.InnerMTU(1500)
					r.note("mtu %d", r.mtu)
				}
			},
			Divert: func(c DivertChange) error {
				r.note("divert +%v -%v = %v, %d policies", c.Add, c.Remove, c.Set(), r.o.SPD.Len())
				return r.divertErr
			},
		})
		r.Attach(r)
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { r.Engine.Run(ctx) })
		defer func() {
			cancel()
			wg.Wait()
			r.Close()
		}()
		f(r)
	})
}

// do runs f as a request.
func (r *rig) do(f func()) { r.Helper(); r.Do(f) }

// want checks what has happened since the last call.
func (r *rig) want(lines ...string) {
	r.Helper()
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.log, lines) {
		r.Fatalf("at %v:\ngot  %q\nwant %q", time.Now().Format("15:04:05.000"), r.log, lines)
	}
	r.log = nil
}

// after lets d pass.
func (r *rig) after(d time.Duration) { time.Sleep(d); synctest.Wait() }

func (r *rig) errno(err error, want syscall.Errno) {
	r.Helper()
	var got syscall.Errno
	if want == 0 && err != nil || want != 0 && !(errors.As(err, &got) && got == want) {
		r.Errorf("got %v, want errno %d", err, want)
	}
}

func key(n int) ipsec.Key {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i + 1)
	}
	return ipsec.NewKey(b)
}

// outSA are parameters of the outbound SA of a tunnel.
func outSA(spi ipsec.SPI, reqid ipsec.ReqID) *ipsec.SAParams {
	return &ipsec.SAParams{
		SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: peer, SPI: spi}, Src: self, Mode: ipsec.Tunnel, ReqID: reqid,
		Encr: alg.EncrAESGCM16, EncrKey: key(20), ReplayWindow: 64,
	}
}

func (r *rig) add(p *ipsec.SAParams, seq uint32) (i *keysock.SAInfo, err error) {
	r.do(func() { i, err = r.Engine.Add(p, seq) })
	return i, err
}

func (r *rig) update(p *ipsec.SAParams, seq uint32) (i *keysock.SAInfo, err error) {
	r.do(func() { i, err = r.Engine.Update(p, seq) })
	return i, err
}

func (r *rig) mustAdd(p *ipsec.SAParams) *sad.SA {
	r.Helper()
	if _, err := r.add(p, 0); err != nil {
		r.Fatal(err)
	}
	r.mu.Lock()
	r.log = nil
	r.mu.Unlock()
	return r.o.SAD.Lookup(p.SAID)
}

// tunnel is an outbound policy.
func tunnel(level ipsec.Level, reqid ipsec.ReqID) *ipsec.Policy {
	return &ipsec.Policy{
		Dir: ipsec.Out, Action: ipsec.Protect,
		Sel:       ipsec.Selector{Src: netip.MustParsePrefix("10.1.0.0/16"), Dst: netip.MustParsePrefix("10.2.0.0/16")},
		Requests:  []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Level: level, ReqID: reqid, Src: self, Dst: peer}},
		Proposals: []ipsec.Proposal{{Encr: alg.EncrAESGCM16}},
	}
}

func (r *rig) policyAdd(conn uint64, p *ipsec.Policy) (i *keysock.PolicyInfo, err error) {
	r.do(func() { i, err = r.AddPolicy(conn, p) })
	return i, err
}

package ike

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
	"go.uber.org/zap"
)

// engine is a keysock.Backend with just enough of an SAD and SPD.
type engine struct {
	mu       sync.Mutex // the test looks in
	spi      ipsec.SPI
	sas      map[ipsec.SAID]*keysock.SAInfo
	policies []*keysock.PolicyInfo
	failed   map[uint32]syscall.Errno
}

func (e *engine) Supported() keysock.Supported {
	return keysock.Supported{Encr: alg.AllEncr(), Auth: alg.AllInteg()}
}
func (e *engine) GetSPI(g keysock.GetSPI) (*keysock.SAInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.spi++
	i := &keysock.SAInfo{Seq: g.Seq, SAParams: ipsec.SAParams{SAID: ipsec.SAID{Proto: g.Proto, Dst: g.Dst, SPI: e.spi}, Src: g.Src, Mode: g.Mode, ReqID: g.ReqID, Encap: g.Encap}}
	e.sas[i.SAID] = i
	return i, nil
}
func (e *engine) Add(p *ipsec.SAParams, seq uint32) (*keysock.SAInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sas[p.SAID] != nil {
		return nil, syscall.EEXIST
	}
	i := &keysock.SAInfo{SAParams: *p, State: keysock.Mature, Seq: seq}
	e.sas[p.SAID] = i
	return i, nil
}
func (e *engine) Update(p *ipsec.SAParams, seq uint32) (*keysock.SAInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i := e.sas[p.SAID]; i == nil || i.State != keysock.Larval {
		return nil, syscall.ESRCH
	}
	i := &keysock.SAInfo{SAParams: *p, State: keysock.Mature, Seq: seq}
	e.sas[p.SAID] = i
	return i, nil
}
func (e *engine) Delete(id ipsec.SAID, _ netip.Addr) (*keysock.SAInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	i := e.sas[id]
	if i == nil {
		return nil, syscall.ESRCH
	}
	delete(e.sas, id)
	return i, nil
}
func (e *engine) Get(id ipsec.SAID, _ netip.Addr) (*keysock.SAInfo, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	i := e.sas[id]
	if i == nil {
		return nil, syscall.ESRCH
	}
	c := *i
	c.SAParams = *clone(&i.SAParams)
	return &c, nil
}
func (e *engine) mature() (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, i := range e.sas {
		if i.State == keysock.Mature {
			n++
		}
	}
	return n
}
func (e *engine) Flush(ipsec.Protocol) bool            { return false }
func (e *engine) SAs(ipsec.Protocol) []*keysock.SAInfo { return nil }
func (e *engine) SAIDs(ipsec.Protocol) []ipsec.SAID    { return nil }
func (e *engine) AcquireFailed(seq uint32, errno syscall.Errno) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failed[seq] = errno
}

var errNot = errors.New("not in this test")

func (e *engine) AddPolicy(uint64, *ipsec.Policy) (*keysock.PolicyInfo, error)    { return nil, errNot }
func (e *engine) UpdatePolicy(uint64, *ipsec.Policy) (*keysock.PolicyInfo, error) { return nil, errNot }
func (e *engine) DeletePolicy(uint64, ipsec.Direction, ipsec.Selector) (*keysock.PolicyInfo, error) {
	return nil, errNot
}
func (e *engine) DeletePolicyID(uint64, uint32) (*keysock.PolicyInfo, error) { return nil, errNot }
func (e *engine) GetPolicy(uint64, uint32) (*keysock.PolicyInfo, error)      { return nil, errNot }
func (e *engine) Policies(uint64) []*keysock.PolicyInfo                      { return e.policies }
func (e *engine) FlushPolicies(uint64) bool                                  { return false }
func (e *engine) Migrate(*keysock.Migration) error                           { return errNot }
func (e *engine) StageSA(uint64, keysock.SAChange) (*keysock.SAInfo, error)  { return nil, errNot }
func (e *engine) Begin(uint64) error                                         { return errNot }
func (e *engine) Commit(uint64) error                                        { return errNot }
func (e *engine) Abort(uint64) error                                         { return nil }
func (e *engine) Status() ([]byte, error)                                    { return []byte("{}"), nil }

// Two daemons with UDP sockets and the real PF_KEY socket, on the loopback
// network.
func TestSockets(t *testing.T) {
	a, b := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")
	port := freePort(t, a, b)
	log := zap.NewNop()
	type host struct {
		e      *engine
		server *keysock.Server
		done   chan error
		stop   context.CancelFunc
	}
	var hosts [2]host
	ctx, cancel := context.WithCancel(context.Background())
	var servers sync.WaitGroup
	defer servers.Wait()
	defer cancel()
	for i, local := range []netip.Addr{a, b} {
		e := &engine{spi: ipsec.SPI(i+1) << 16, sas: map[ipsec.SAID]*keysock.SAInfo{}, failed: map[uint32]syscall.Errno{}}
		for _, p := range policies(local, []netip.Addr{b, a}[i]) {
			e.policies = append(e.policies, &keysock.PolicyInfo{Policy: p})
		}
		path := filepath.Join(t.TempDir(), "lo.pfkey")
		server, err := keysock.NewServer(path, e, keysock.ServerOptions{})
		if err != nil {
			t.Fatal(err)
		}
		servers.Go(func() {
			if err := server.Serve(ctx); err != nil && ctx.Err() == nil {
				t.Errorf("server: %v", err)
			}
		})
		r := pad.NewRule("peer")
		r.Remote, r.PSK, r.RemotePort = pad.Any(), keys("correct horse battery"), port
		db, err := pad.NewDB([]*pad.Rule{r})
		if err != nil {
			t.Fatal(err)
		}
		ready := make(chan struct{})
		d, err := New(Config{
			Local: []netip.Addr{local}, Rules: db, IKEPort: port, Listen: ListenUDP, Log: log, Ready: func() { close(ready) },
			Dial: func(ctx context.Context) (KeySocket, error) {
				c, err := keysock.Dial(ctx, path)
				if err != nil {
					return nil, err
				}
				return c, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		dctx, stop := context.WithCancel(context.Background())
		hosts[i] = host{e, server, make(chan error, 1), stop}
		go func() { hosts[i].done <- d.Run(dctx) }()
		select {
		case <-ready:
		case err := <-hosts[i].done:
			stop()
			t.Fatalf("Run: %v", err)
		}
	}
	hosts[0].server.Acquire(keysock.Acquire{Seq: 77, Proto: ipsec.ESP, Src: a, Dst: b, PolicyID: 1, Mode: ipsec.Transport, ReqID: 7,
		Proposals: hosts[0].e.policies[0].Proposals, Flow: &ipsec.Flow{Src: a, Dst: b, Proto: 1}}, 0)
	wait := func(want int) {
		t.Helper()
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if hosts[0].e.mature() == want && hosts[1].e.mature() == want {
				return
			}
		}
		t.Errorf("got %d and %d SAs, want %d on both; failed %v", hosts[0].e.mature(), hosts[1].e.mature(), want, hosts[0].e.failed)
	}
	wait(2)
	hosts[0].stop()
	if err := <-hosts[0].done; err != nil {
		t.Errorf("Run: %v", err)
	}
	wait(0)
	hosts[1].stop()
	if err := <-hosts[1].done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// freePort finds a UDP port that is free on all of addrs, and that the kernel gives
// nobody who asks for any.
func freePort(t *testing.T, addrs ...netip.Addr) uint16 {
	t.Helper()
	for k := range 100 {
		port := uint16(20000 + (os.Getpid()*100+k)%10000)
		free := true
		for _, a := range addrs {
			c, err := ListenUDP(netip.AddrPortFrom(a, port))
			if free = free && err == nil; err == nil {
				c.Close()
			}
		}
		if free {
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

func TestListenUDPErrors(t *testing.T) {
	c, err := ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUDP(c.(*udpConn).local); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("port in use: got %v, want %v", err, syscall.EADDRINUSE)
	}
	if _, err := ListenUDP(netip.MustParseAddrPort("192.0.2.77:0")); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("foreign address: got %v, want %v", err, syscall.EADDRNOTAVAIL)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, _, _, err := c.Receive(make([]byte, 10)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: got %v, want %v", err, net.ErrClosed)
	}
}

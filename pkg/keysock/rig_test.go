package keysock

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// TestMain fails when a test leaves one of our goroutines running.
func TestMain(m *testing.M) {
	code := m.Run()
	for end := time.Now().Add(time.Minute); code == 0; time.Sleep(10 * time.Millisecond) {
		buf := make([]byte, 1<<20)
		stacks := string(buf[:runtime.Stack(buf, true)])
		if strings.Count(stacks, "pkg/keysock.") <= 1 { // TestMain itself
			break
		}
		if time.Now().After(end) {
			os.Stderr.WriteString("goroutines left:\n" + stacks)
			code = 1
		}
	}
	os.Exit(code)
}

type rig struct {
	t    *testing.T
	path string
	b    *fakeBackend
	s    *Server
	stop func()
}

// start runs a server with a fake backend until the test ends.
func start(t *testing.T, opt ServerOptions) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "ks") // short: a socket's name has 107 octets
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "eth0.pfkey")
	b := newFake()
	s, err := NewServer(path, b, opt)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	stopped := false
	r := &rig{t: t, path: path, b: b, s: s}
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(time.Minute):
			t.Error("Serve does not return")
		}
		os.RemoveAll(dir)
	}
	t.Cleanup(r.stop)
	return r
}

func (r *rig) dial() *Client {
	r.t.Helper()
	c, err := Dial(r.ctx(), r.path)
	if err != nil {
		r.t.Fatalf("Dial: %v", err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	r.t.Cleanup(cancel)
	return ctx
}

// inServer runs f in the goroutine of Serve and waits for it.
func (r *rig) inServer(f func()) {
	r.t.Helper()
	done := make(chan struct{})
	r.s.Do(func() { f(); close(done) })
	select {
	case <-done:
	case <-time.After(time.Minute):
		r.t.Fatal("Do: function does not run")
	}
}

// stranger is a program that knows PF_KEY and nothing of us.
type stranger struct {
	t  *testing.T
	nc *net.UnixConn
}

func (r *rig) stranger() *stranger {
	r.t.Helper()
	seen := func() uint64 { st := r.s.Stats(); return st.Accepted + st.Refused }
	before := seen()
	nc, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: r.path, Net: "unixpacket"})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { nc.Close() })
	// connect(2) returns before the server has accepted; who is not accepted
	// yet hears nothing of what others do.
	for end := time.Now().Add(time.Minute); seen() == before; time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			r.t.Fatal("not accepted in a minute")
		}
	}
	return &stranger{r.t, nc}
}

func (x *stranger) sendRaw(b []byte) {
	x.t.Helper()
	x.nc.SetWriteDeadline(time.Now().Add(time.Minute))
	if _, err := x.nc.Write(b); err != nil {
		x.t.Fatalf("send: %v", err)
	}
}

func (x *stranger) send(m *pfkey.Message) {
	x.t.Helper()
	b, err := m.Append(nil)
	if err != nil {
		x.t.Fatalf("Append: %v", err)
	}
	x.sendRaw(b)
}

// recv returns the next message.
func (x *stranger) recv() *pfkey.Message {
	x.t.Helper()
	x.nc.SetReadDeadline(time.Now().Add(time.Minute))
	b := make([]byte, maxMessage)
	n, err := x.nc.Read(b)
	if err != nil {
		x.t.Fatalf("recv: %v", err)
	}
	m, err := pfkey.Decode(b[:n])
	if err != nil {
		x.t.Fatalf("recv: %v in %x", err, b[:n])
	}
	return m
}

// want receives a message and checks its header.
func (x *stranger) want(h pfkey.Header) *pfkey.Message {
	x.t.Helper()
	m := x.recv()
	if m.Header != h {
		x.t.Fatalf("got %+v, want %+v", m.Header, h)
	}
	return m
}

// ask sends m and receives an answer with its header and errno.
func (x *stranger) ask(m *pfkey.Message, errno uint8) *pfkey.Message {
	x.t.Helper()
	x.send(m)
	h := m.Header
	h.Errno = errno
	return x.want(h)
}

// quiet checks that nothing waits: the answer to a request of its own comes next.
func (x *stranger) quiet() {
	x.t.Helper()
	h := pfkey.Header{Type: pfkey.Get, SAType: pfkey.SATypeESP, Seq: 0xfffffff0, Pid: 99}
	x.send(&pfkey.Message{Header: h})
	h.Errno = 22
	x.want(h)
}

func (x *stranger) register() {
	x.t.Helper()
	x.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Register, SAType: pfkey.SATypeESP, Seq: 1, Pid: 50}}, 0)
}

// nextEvent returns the next event of a client.
func nextEvent(t *testing.T, c *Client) Event {
	t.Helper()
	select {
	case e, ok := <-c.Events():
		if !ok {
			t.Fatal("events are closed")
		}
		return e
	case <-time.After(time.Minute):
		t.Fatal("no event")
	}
	return nil
}

func wantEvent(t *testing.T, c *Client, want Event) {
	t.Helper()
	if got := nextEvent(t, c); !reflect.DeepEqual(got, want) {
		t.Errorf("event:\n got %T%+v\nwant %T%+v", got, got, want, want)
	}
}

func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func key(n int) ipsec.Key {
	b := make([]byte, n)
	for i := range b {
		b[i] = 0xa0 + byte(i)
	}
	return ipsec.NewKey(b)
}

// params is an ESP tunnel with everything set.
func params(spi ipsec.SPI) *ipsec.SAParams {
	return &ipsec.SAParams{
		SAID: ipsec.SAID{Proto: ipsec.ESP, Dst: addr("198.51.100.2"), SPI: spi}, Src: addr("192.0.2.1"),
		Mode: ipsec.Tunnel, ReqID: 7,
		Encr: alg.EncrAESCBC, EncrKey: key(16), Auth: alg.IntegHMACSHA256, AuthKey: key(32),
		ReplayWindow: 4096, ESN: true, AggFrag: true,
		Hard: ipsec.Lifetime{Packets: 1 << 36, Bytes: 1 << 50, AddTime: time.Hour, UseTime: 2 * time.Hour},
		Soft: ipsec.Lifetime{Packets: 1 << 35, Bytes: 1 << 49, AddTime: 50 * time.Minute, UseTime: time.Hour},
		Idle: ipsec.Idle{AddTime: 20 * time.Minute, UseTime: 10 * time.Minute}, LastSeq: 1 << 40,
		Encap: &ipsec.Encap{SPort: 4500, DPort: 1024, OA: addr("10.0.0.9")},
		SrcTS: []ipsec.TrafficSelector{{Proto: 6, Start: addr("10.1.0.0"), End: addr("10.1.255.255"), PortLo: 80, PortHi: 443}},
		DstTS: []ipsec.TrafficSelector{
			{Start: addr("10.2.0.0"), End: addr("10.2.0.255"), PortHi: 65535},
			{Proto: 17, Start: addr("2001:db8::"), End: addr("2001:db8::ff"), PortLo: 65535},
		},
	}
}

// policy is an outbound tunnel from 10.1.n.0/24.
func policy(n byte) *ipsec.Policy {
	return &ipsec.Policy{
		Dir: ipsec.Out,
		Sel: ipsec.Selector{
			Src: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, n, 0}), 24),
			Dst: netip.MustParsePrefix("10.2.0.0/16"), Proto: 6, DstPort: 443,
		},
		Action: ipsec.Protect, Priority: 0x80000000,
		Requests: []ipsec.Request{{
			Proto: ipsec.ESP, Mode: ipsec.Tunnel, Level: ipsec.LevelUnique,
			Src: addr("192.0.2.1"), Dst: addr("198.51.100.2"),
		}},
		Proposals: []ipsec.Proposal{
			{Encr: alg.EncrAESGCM16, EncrMinBits: 128, EncrMaxBits: 256, Hard: ipsec.Lifetime{AddTime: time.Hour}},
			{Encr: alg.EncrAESCBC, EncrMinBits: 256, EncrMaxBits: 256, Auth: alg.IntegHMACSHA512},
			{},
		},
		Hard: ipsec.Lifetime{AddTime: 24 * time.Hour},
	}
}

// sameSA compares SAs, keys by their octets.
func sameSA(a, b *SAInfo) bool {
	x, y := *a, *b
	x.EncrKey, x.AuthKey, y.EncrKey, y.AuthKey = ipsec.Key{}, ipsec.Key{}, ipsec.Key{}, ipsec.Key{}
	return reflect.DeepEqual(x, y) && a.EncrKey.Equal(b.EncrKey) && a.AuthKey.Equal(b.AuthKey)
}

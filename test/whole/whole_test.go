// Package whole runs two hosts in one process, each with the policy language, the
// key daemon, the PF_KEY socket, the key engine and the data path of the product,
// and a link in memory. Only the kernel is missing: what it would send goes into
// the TAP, and what it would get comes out of it.
package whole

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/config/apply"
	"github.com/missiu/missiu/pkg/config/ipsecconf"
	"github.com/missiu/missiu/pkg/datapath"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ike"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keyengine"
	"github.com/missiu/missiu/pkg/keysock"
	"go.uber.org/zap"
)

var mac = net.HardwareAddr{2, 0, 0, 0, 0, 9}

const etherLen = 14

// host is one of two. Its channels are the kernel's side of the TAP and the link.
type host struct {
	t        *testing.T
	addr     netip.Addr
	local    []netip.Addr
	fromUp   chan []byte // IP packets from the kernel
	toUp     chan []byte // and for it
	fromLink chan []byte
	toLink   chan []byte // the other's fromLink
	ikeIn    chan msg
	ikePeer  chan msg
	closed   chan struct{}
	seen     chan []byte // copies of what went to the link, while there is room

	db   *sad.DB
	pol  *spd.DB
	eng  *datapath.Engine
	keys *keysock.Client
}

type msg struct {
	b        []byte
	from, to netip.AddrPort
}

// The TAP.

type tapDev struct{ *host }

func (tapDev) Name() string          { return "tap0" }
func (tapDev) Index() int            { return 1 }
func (tapDev) MAC() net.HardwareAddr { return mac }
func (tapDev) MTU() int              { return 1300 }
func (tapDev) SetMTU(int) error      { return nil }
func (tapDev) Persist(bool) error    { return nil }
func (tapDev) ReadSuper() tap.Super  { return tap.Super{} }
func (tapDev) Super() tap.Super      { return tap.Super{} }
func (tapDev) Cut() uint64           { return 0 }
func (tapDev) Lost() tap.Lost        { return tap.Lost{} }
func (tapDev) Close() error          { return nil }
func (h tapDev) Queues() []tap.Queue { return []tap.Queue{h} }
func (h tapDev) take(f *tap.Frame, b []byte) {
	x := f.Buf[f.Off:]
	copy(x, mac)
	copy(x[6:], mac)
	binary.BigEndian.PutUint16(x[12:], 0x0800)
	f.Len = etherLen + copy(x[etherLen:], b)
}

func (h tapDev) ReadBatch(fs []tap.Frame) (int, error) {
	select {
	case b := <-h.fromUp:
		h.take(&fs[0], b)
		return 1, nil
	case <-h.closed:
		return 0, os.ErrClosed
	}
}

func (h tapDev) WriteBatch(fs []tap.Frame) (int, error) {
	for _, f := range fs {
		h.toUp <- bytes.Clone(f.Buf[f.Off+etherLen : f.Off+f.Len])
	}
	return len(fs), nil
}

// The link.

type linkDev struct{ *host }

func (linkDev) PathMTU(netip.Addr) int      { return 1500 }
func (h linkDev) IsLocal(a netip.Addr) bool { return slices.Contains(h.local, a) }

func (h linkDev) ReadBatch(ps []wire.Packet) (int, error) {
	select {
	case b := <-h.fromLink:
		ps[0].Len = copy(ps[0].Buf[ps[0].Off:], b)
		return 1, nil
	case <-h.closed:
		return 0, os.ErrClosed
	}
}

func (h linkDev) WriteBatch(ps []wire.Packet) (int, error) {
	for _, p := range ps {
		b := bytes.Clone(p.Buf[p.Off : p.Off+p.Len])
		select {
		case h.seen <- b:
		default:
		}
		h.toLink <- b
	}
	return len(ps), nil
}

// The port of IKE.

type ikeConn struct {
	*host
	over chan struct{}
	once *sync.Once
}

func (c ikeConn) Receive(b []byte) (int, netip.AddrPort, netip.AddrPort, error) {
	select {
	case m := <-c.ikeIn:
		return copy(b, m.b), m.to, m.from, nil
	case <-c.over:
		return 0, netip.AddrPort{}, netip.AddrPort{}, net.ErrClosed
	}
}

func (c ikeConn) Send(b []byte, local, remote netip.AddrPort) error {
	c.ikePeer <- msg{bytes.Clone(b), local, remote}
	return nil
}

func (c ikeConn) Close() error {
	c.once.Do(func() { close(c.over) })
	return nil
}

// pair makes two hosts, 192.0.2.1 with 10.1.0.1 behind it and 192.0.2.2 with
// 10.2.0.1, and runs them until the test ends.
func pair(t *testing.T) (a, b *host) {
	mk := func(s ...string) *host {
		h := &host{t: t, fromUp: make(chan []byte, 256), toUp: make(chan []byte, 256), fromLink: make(chan []byte, 256),
			ikeIn: make(chan msg, 64), closed: make(chan struct{}), seen: make(chan []byte, 4096)}
		for _, x := range s {
			h.local = append(h.local, netip.MustParseAddr(x))
		}
		h.addr = h.local[0]
		return h
	}
	a, b = mk("192.0.2.1", "10.1.0.1"), mk("192.0.2.2", "10.2.0.1")
	a.toLink, b.toLink, a.ikePeer, b.ikePeer = b.fromLink, a.fromLink, b.ikeIn, a.ikeIn
	for _, h := range []*host{a, b} {
		h.run()
	}
	return a, b
}

func (h *host) run() {
	t := h.t
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.MkdirTemp("", "whole")
	ok(err)
	path := filepath.Join(dir, "eth0.pfkey")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	h.db, h.pol = sad.NewDB(), spd.NewDB()
	ke := keyengine.New(keyengine.Options{
		SAD: h.db, SPD: h.pol, Status: func() ([]byte, error) { return []byte("{}"), nil },
		Installed: func(k sad.OutKey) { h.eng.Installed(k) }, Failed: func(k sad.OutKey) { h.eng.Failed(k) },
	})
	h.eng, err = datapath.New(datapath.Config{
		TAP: tapDev{h}, Wire: linkDev{h}, SAD: h.db, SPD: h.pol, Default: ipsec.Bypass,
		NeedSA: ke.NeedSA, LimitReached: ke.LimitReached, NewMapping: ke.NewMapping, Log: zap.NewNop(),
	})
	ok(err)
	srv, err := keysock.NewServer(path, ke, keysock.ServerOptions{})
	ok(err)
	ke.Attach(srv)
	wg.Go(func() { srv.Serve(ctx) })
	wg.Go(func() { ke.Run(ctx) })
	wg.Go(func() { h.eng.Run(ctx) })
	h.keys, err = keysock.Dial(ctx, path)
	ok(err)

	rule := pad.NewRule("any")
	key := ipsec.NewKey([]byte("the secret of the two hosts"))
	rule.Remote, rule.PSK = pad.Any(), pad.Keys{Local: key, Remote: key}
	db, err := pad.NewDB([]*pad.Rule{rule})
	ok(err)
	ready := make(chan struct{})
	d, err := ike.New(ike.Config{
		Local: []netip.Addr{h.addr}, Rules: db, Log: zap.NewNop(), Ready: func() { close(ready) },
		Listen: func(netip.AddrPort) (ike.Conn, error) { return ikeConn{h, make(chan struct{}), new(sync.Once)}, nil },
		Dial:   func(ctx context.Context) (ike.KeySocket, error) { return keysock.Dial(ctx, path) },
	})
	ok(err)
	ikeCtx, stopIKE := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { d.Run(ikeCtx); close(ended) }()
	<-ready
	t.Cleanup(func() {
		stopIKE()
		<-ended
		h.keys.Close()
		close(h.closed)
		cancel()
		wg.Wait()
		ke.Close()
		os.RemoveAll(dir)
	})
}

// load puts a policy file in force.
func (h *host) load(text string) {
	h.t.Helper()
	c, l := ipsecconf.Load("test", strings.NewReader(text), ipsecconf.Options{})
	if l.Failed() {
		h.t.Fatalf("%v", l.All())
	}
	if _, err := apply.Load(h.t.Context(), h.keys, "test", c, apply.Replace); err != nil {
		h.t.Fatal(err)
	}
}

// listed is what loadConfig -l shows.
func (h *host) listed() string {
	h.t.Helper()
	ps, err := h.keys.DumpPolicies(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	var b strings.Builder
	if err := apply.WritePolicies(&b, ps, nil, apply.Listing{}); err != nil {
		h.t.Fatal(err)
	}
	return b.String()
}

// sas lists the SAs by which h sends: protocol and algorithms, ESP first.
func (h *host) sas() string {
	var l []string
	h.db.Each(func(s *sad.SA) bool {
		switch {
		case s.P.Src != h.addr || s.State() == sad.Larval || s.State() == sad.Dead:
		case s.P.Proto == ipsec.AH:
			l = append(l, "z ah "+s.P.Auth.String())
		default:
			l = append(l, strings.TrimSuffix("y "+s.P.Encr.String()+" "+s.P.Auth.String(), " none"))
		}
		return true
	})
	slices.Sort(l)
	for i := range l {
		l[i] = l[i][2:]
	}
	return strings.Join(l, ", ")
}

// send gives a UDP packet of n octets of text to h's TAP.
func (h *host) send(src, dst netip.Addr, port uint16, n int) []byte {
	p := make([]byte, packet.IPv4Len+packet.UDPLen+n)
	packet.PutHeader(p, src, dst, 17, len(p), 64)
	p[4] = 1 // AH sees to it that there is an identification
	u := p[packet.IPv4Len:]
	binary.BigEndian.PutUint16(u, port)
	binary.BigEndian.PutUint16(u[2:], 9)
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	for i := range u[packet.UDPLen:] {
		u[packet.UDPLen+i] = "secret"[i%6]
	}
	packet.FixIPv4Checksum(p)
	packet.PutUDPChecksum(p)
	h.fromUp <- p
	return p
}

// long is more than even a machine that stands still now and then takes.
const long = 2 * time.Minute

// gets waits for a packet for h's kernel.
func (h *host) gets(wait time.Duration) []byte {
	select {
	case b := <-h.toUp:
		return b
	case <-time.After(wait):
		return nil
	}
}

// first sends packets until one arrives: key daemons hear of policies a moment
// after they are in force, and what one refuses until then is not asked again at once.
func first(t *testing.T, a, b *host, src, dst netip.Addr) {
	t.Helper()
	sent, got := 0, 0
	until(t, "the first packet", func() bool {
		a.send(src, dst, 1, 10)
		sent++
		if b.gets(500*time.Millisecond) == nil {
			return false
		}
		got++
		return true
	})
	until(t, "those that waited with it", func() bool {
		for b.gets(0) != nil {
			got++
		}
		gone := 0
		for name, n := range nonzero(a) {
			if strings.HasPrefix(name, "drop_out_") || name == "out_protected" {
				gone += int(n)
			}
		}
		return gone == sent && got == int(nonzero(a)["out_protected"])
	})
	a.drain()
	b.drain()
}

// drain forgets what was seen on the link so far.
func (h *host) drain() (ps [][]byte) {
	for {
		select {
		case p := <-h.seen:
			ps = append(ps, p)
		default:
			return ps
		}
	}
}

func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(long); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, long)
		}
	}
}

func entry(h, peer *host, tunnel bool, actions string) string {
	if !tunnel {
		return fmt.Sprintf("{ raddr %v } %s\n", peer.addr, actions)
	}
	ends := fmt.Sprintf(" tladdr %v traddr %v }", h.addr, peer.addr)
	return fmt.Sprintf("{ laddr %v/24 raddr %v/24 } %s\n", h.local[1], peer.local[1], strings.ReplaceAll(actions, " }", ends))
}

// encrypts finds in a list of SAs one that hides its payload.
var encrypts = regexp.MustCompile(`aes-(cbc|ctr|ccm|gcm)`)

// TestNegotiated: from policy files to packets. Both hosts agree on what the
// responder likes best of what both have; packets arrive as they were, protected
// by exactly that, and the listing of the policies is a file that says the same.
func TestNegotiated(t *testing.T) {
	const esp, ah = 50, 51
	for _, tt := range []struct {
		name, a, b string // b: "" as a
		want       string
		proto      uint8 // on the link
		inner      uint8 // inside AH in transport mode
	}{
		{"AH sha1", "ipsec { auth_algs sha1 }", "", "ah hmac-sha1", ah, 17},
		{"AH sha256", "ipsec { auth_algs sha256 }", "", "ah hmac-sha256", ah, 17},
		{"AH sha384", "ipsec { auth_algs sha384 }", "", "ah hmac-sha384", ah, 17},
		{"AH aes-xcbc", "ipsec { auth_algs aes-xcbc }", "", "ah aes-xcbc", ah, 17},
		{"AH aes-cmac", "ipsec { auth_algs aes-cmac }", "", "ah aes-cmac", ah, 17},
		{"AH gmac 128", "ipsec { auth_algs aes-gmac-128 }", "", "ah aes-gmac-128", ah, 17},
		{"AH gmac 192", "ipsec { auth_algs aes-gmac-192 }", "", "ah aes-gmac-192", ah, 17},
		{"AH gmac 256", "ipsec { auth_algs aes-gmac-256 }", "", "ah aes-gmac-256", ah, 17},
		{"any AH", "ipsec { auth_algs any }", "ipsec { auth_algs sha512 }", "ah hmac-sha512", ah, 17},
		{"AH and ESP", "ipsec { auth_algs sha256 encr_algs aes encr_auth_algs sha1 }", "", "aes-cbc hmac-sha1, ah hmac-sha256", ah, esp},
		{"AH and AEAD", "ipsec { auth_algs sha1 encr_algs gcm(128) }", "", "aes-gcm-16, ah hmac-sha1", ah, esp},
		{"AH and ESP of any integrity", "ipsec { auth_algs sha1 encr_algs aes(192) }", "", "aes-cbc hmac-sha256, ah hmac-sha1", ah, esp},
		{"AH and NULL", "ipsec { auth_algs sha1 encr_auth_algs sha512 }", "", "null hmac-sha512, ah hmac-sha1", ah, esp},
		{"GMAC twice", "ipsec { auth_algs aes-gmac-256 encr_algs gmac(256) }", "", "null-aes-gmac, ah aes-gmac-256", ah, esp},
		{"CTR", "ipsec { encr_algs ctr(256) encr_auth_algs sha256 }", "", "aes-ctr hmac-sha256", esp, 0},
		{"CCM", "ipsec { encr_algs ccm }", "", "aes-ccm-16", esp, 0},
		{"CCM 8", "ipsec { encr_algs ccm(128) tag 8 }", "", "aes-ccm-8", esp, 0},
		{"GMAC of ESP", "ipsec { encr_algs gmac }", "", "null-aes-gmac", esp, 0},
		{"the responder's order", "ipsec { encr_algs gcm } or ipsec { auth_algs sha256 }", "ipsec { auth_algs sha256 } or ipsec { encr_algs gcm }", "ah hmac-sha256", ah, 17},
		{"what both have", "ipsec { auth_algs sha1 } or ipsec { encr_algs aes encr_auth_algs sha1 } or ipsec { encr_algs gcm }", "ipsec { auth_algs sha256 } or ipsec { encr_algs gcm }", "aes-gcm-16", esp, 0},
		{"both transforms in one alternative", "ipsec { auth_algs sha256 encr_algs aes encr_auth_algs sha256 } or ipsec { encr_algs gcm }", "", "aes-cbc hmac-sha256, ah hmac-sha256", ah, esp},
		{"of several of both", "ipsec { auth_algs sha1 encr_algs gcm } or ipsec { auth_algs sha256 encr_algs aes encr_auth_algs sha256 }",
			"ipsec { auth_algs sha256 encr_algs aes encr_auth_algs sha256 } or ipsec { auth_algs sha1 encr_algs gcm }", "aes-cbc hmac-sha256, ah hmac-sha256", ah, esp},
	} {
		for _, tunnel := range []bool{false, true} {
			t.Run(tt.name+map[bool]string{true: " tunnel"}[tunnel], func(t *testing.T) {
				a, b := pair(t)
				ofB := tt.b
				if ofB == "" {
					ofB = tt.a
				}
				a.load(entry(a, b, tunnel, tt.a))
				b.load(entry(b, a, tunnel, ofB))
				at := map[bool]int{true: 1}[tunnel]
				first(t, a, b, a.local[at], b.local[at])
				for k := range 6 {
					for _, d := range [][2]*host{{a, b}, {b, a}} {
						sent := d[0].send(d[0].local[at], d[1].local[at], uint16(1000+k), 50*k)
						if got := d[1].gets(long); !bytes.Equal(got, sent) {
							t.Fatalf("packet %d: got %x, want %x; SAs %s; at a %v, at b %v", k, got, sent, a.sas(), nonzero(a), nonzero(b))
						}
					}
				}
				for _, h := range []*host{a, b} {
					if got := h.sas(); got != tt.want {
						t.Errorf("SAs of %v: got %q, want %q", h.addr, got, tt.want)
					}
					ps := h.drain()
					if len(ps) != 6 {
						t.Errorf("%d packets on the link, want 6", len(ps))
					}
					inner := tt.inner
					if tunnel && tt.proto == ah {
						inner = 4
					}
					for _, p := range ps {
						if p[9] != tt.proto || inner != 0 && p[20] != inner {
							t.Errorf("on the link: protocol %d with %d inside, want %d with %d", p[9], p[20], tt.proto, inner)
						}
						if encrypts.MatchString(tt.want) && bytes.Contains(p, []byte("secretsecret")) {
							t.Error("the text can be read on the link")
						}
					}
					before := h.listed()
					h.load(before)
					if got := h.sas(); got != tt.want {
						t.Errorf("loading what is listed leaves %q\n%s", got, before)
					}
					if _, n := dropped(h); n != 0 {
						t.Errorf("%v", nonzero(h))
					}
				}
			})
		}
	}
}

func nonzero(h *host) map[string]uint64 {
	m := map[string]uint64{}
	for i, v := range h.eng.Stats() {
		if v != 0 {
			m[datapath.Counter(i).String()] = v
		}
	}
	return m
}

// dropped counts inbound packets that were refused, by policy and all.
func dropped(h *host) (byPolicy, all uint64) {
	for name, n := range nonzero(h) {
		if strings.HasPrefix(name, "drop_in_") {
			all += n
		}
		if name == "drop_in_policy" {
			byPolicy += n
		}
	}
	return byPolicy, all
}

// TestOneOfTwo: of ESP inside AH one pair of SAs that goes is negotiated anew by
// the next packet, which waits for it, and the other stays.
func TestOneOfTwo(t *testing.T) {
	a, b := pair(t)
	const both = "ipsec { auth_algs sha256 encr_algs gcm }"
	a.load(entry(a, b, false, both))
	b.load(entry(b, a, false, both))
	pass := func() {
		t.Helper()
		sent := a.send(a.addr, b.addr, 1, 100)
		if got := b.gets(long); !bytes.Equal(got, sent) {
			t.Fatalf("got %x, want %x; SAs %s", got, sent, a.sas())
		}
	}
	first(t, a, b, a.addr, b.addr)
	pass()
	inbound := func(h *host, proto ipsec.Protocol) (l []ipsec.SAID) {
		h.db.Each(func(s *sad.SA) bool {
			if s.P.Proto == proto && s.P.Dst == h.addr && s.State() != sad.Larval {
				l = append(l, s.P.SAID)
			}
			return true
		})
		return l
	}
	for _, proto := range []ipsec.Protocol{ipsec.AH, ipsec.ESP} {
		other := ipsec.AH + ipsec.ESP - proto
		gone, kept := inbound(b, proto), inbound(b, other)
		if len(gone) != 1 || len(kept) != 1 {
			t.Fatalf("SAs %v, %v", gone, kept)
		}
		if err := b.keys.Delete(t.Context(), gone[0], a.addr); err != nil {
			t.Fatal(err)
		}
		until(t, "a hears of it", func() bool { return len(inbound(a, proto)) == 0 })
		if a.sas() == "aes-gcm-16, ah hmac-sha256" {
			t.Errorf("a has %s", a.sas())
		}
		pass()
		if got := inbound(b, other); !slices.Equal(got, kept) {
			t.Errorf("%v: got %v, had %v", other, got, kept)
		}
		if got := inbound(b, proto); len(got) != 1 || got[0] == gone[0] {
			t.Errorf("%v: got %v, had %v", proto, got, gone)
		}
	}
	for _, p := range a.drain() {
		if p[9] != 51 || p[20] != 50 {
			t.Errorf("on the link: protocol %d with %d inside", p[9], p[20])
		}
	}
}

// TestNeverLess: a packet with one of the two transforms that policy wants is
// dropped, though its SA is one that was negotiated for the policy; and nothing
// that lacks one leaves.
func TestNeverLess(t *testing.T) {
	for _, tt := range [][2]string{
		{"ipsec { encr_algs gcm }", "ipsec { auth_algs sha256 encr_algs gcm }"},
		{"ipsec { encr_algs gcm }", "ipsec { auth_algs sha256 encr_algs gcm } or ipsec { encr_algs aes encr_auth_algs sha512 }"},
		{"ipsec { auth_algs sha256 }", "ipsec { auth_algs sha256 encr_algs gcm } or ipsec { encr_algs aes encr_auth_algs sha512 }"},
	} {
		a, b := pair(t)
		a.load(entry(a, b, false, tt[0]))
		b.load(entry(b, a, false, tt[1]))
		until(t, "b drops them", func() bool {
			a.send(a.addr, b.addr, 7, 100)
			n, _ := dropped(b)
			return n > 5
		})
		b.send(b.addr, a.addr, 7, 100)
		if got := b.gets(100 * time.Millisecond); got != nil {
			t.Errorf("%s: b takes %x", tt[1], got)
		}
		if got := a.gets(300 * time.Millisecond); got != nil {
			t.Errorf("%s: a gets %x", tt[1], got)
		}
		if ps := b.drain(); len(ps) != 0 {
			t.Errorf("%s: %x left b", tt[1], ps)
		}
	}
}

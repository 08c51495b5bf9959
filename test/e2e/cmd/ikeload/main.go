// Ikeload sets up many IKE SAs with one responder, each from an address of its own,
// and holds them; it may flood the responder with half-open requests meanwhile.
// All initiators are machines of pkg/ike/sa in this one process, so that the
// responder alone differs between two measurements.
//
//	ikeload [options] RESPONDER PSK
//
// It writes one line when the SAs are up and one after the flood, then waits for
// its end.
package main

import (
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/cred"
	"github.com/missiu/missiu/pkg/ike/cred/credtest"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/ikev2"
	"golang.org/x/net/ipv4"
)

var (
	number   = flag.Int("n", 1000, "IKE SAs")
	parallel = flag.Int("parallel", 16, "of them at a time")
	first    = flag.String("from", "10.64.0.1", "address of the first; each other has the next")
	ca       = flag.String("ca", "", "PEM file with a CA's certificate and key: each has a certificate of it, and ECDSA in place of the secret")
	child    = flag.Bool("child", false, "with a child SA between the two addresses")
	floods   = flag.Int("flood", 0, "half-open requests a second once all are up")
	during   = flag.Duration("for", 10*time.Second, "length of the flood")
	strange  = flag.String("strangers", "10.65.0.0", "first of 65536 addresses that the flood comes from")
)

// peer is one initiator. The lock is its machine's.
type peer struct {
	mu   sync.Mutex
	at   netip.Addr
	sa   *sa.SA
	up   bool
	spis ipsec.SPI
}

type load struct {
	to    netip.Addr
	peers []*peer
	base  uint32
	conns map[uint16]*ipv4.PacketConn
	up    atomic.Int64
	lost  atomic.Int64
	// answered counts IKE SAs that were rekeyed.
	answered atomic.Int64
	slots    chan struct{}
	done     chan struct{}
}

func (*load) Policies(sa.Query) []sa.Policy { return nil }
func (*load) Admit(sa.Peer) (bool, error)   { return true, nil }

func main() {
	flag.Parse()
	if err := run(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "ikeload:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return errors.New("want the responder's address and the secret")
	}
	to, err := netip.ParseAddr(args[0])
	if err != nil {
		return err
	}
	from, err := netip.ParseAddr(*first)
	if err != nil || !from.Is4() {
		return fmt.Errorf("%s is no IPv4 address", *first)
	}
	l := &load{to: to, base: num(from), conns: map[uint16]*ipv4.PacketConn{}, slots: make(chan struct{}, *parallel), done: make(chan struct{})}
	rule := newRule(args[1])
	var issuer *credtest.Cert
	if *ca != "" {
		if issuer, err = readCA(*ca); err != nil {
			return err
		}
	}
	for i := range *number {
		p := &peer{at: addr(l.base + uint32(i))}
		if issuer != nil {
			if rule, err = certRule(issuer, fmt.Sprintf("h%d.example.com", i)); err != nil {
				return err
			}
		}
		p.sa = sa.NewInitiator(sa.Config{Local: netip.AddrPortFrom(p.at, 500), Remote: netip.AddrPortFrom(to, 500), Host: l, InitialContact: true}, rule)
		l.peers = append(l.peers, p)
	}
	for _, port := range []uint16{500, 4500} {
		c, err := net.ListenPacket("udp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		c.(*net.UDPConn).SetReadBuffer(8 << 20)
		pc := ipv4.NewPacketConn(c)
		if err := pc.SetControlMessage(ipv4.FlagDst, true); err != nil {
			return err
		}
		l.conns[port] = pc
		for range 2 {
			go l.receive(port, pc)
		}
	}
	go l.ticks()
	start := time.Now()
	go func() {
		for _, p := range l.peers {
			l.slots <- struct{}{}
			p.mu.Lock()
			l.do(p, p.sa.Start(time.Now(), l.wanted(p)...))
			p.mu.Unlock()
		}
	}()
	if *number > 0 {
		<-l.done
	}
	fmt.Printf("up %d failed %d seconds %.3f\n", l.up.Load(), l.lost.Load(), time.Since(start).Seconds())
	if *floods > 0 {
		asked := make(chan int)
		go func() { asked <- l.ask() }()
		n, err := l.flood(rule)
		if err != nil {
			return err
		}
		want := <-asked
		for end := time.Now().Add(20 * time.Second); l.answered.Load() < int64(want) && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		fmt.Printf("flood %d lost %d asked %d answered %d\n", n, l.lost.Load(), want, l.answered.Load())
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	<-end
	return nil
}

func newRule(psk string) *pad.Rule {
	r := pad.NewRule("load")
	r.Remote = pad.Any()
	r.PSK = pad.Keys{Local: ipsec.NewKey([]byte(psk)), Remote: ipsec.NewKey([]byte(psk))}
	r.Keepalive, r.DPD = 0, 0
	r.Proposals = []proposal.IKE{{
		Ciphers: []proposal.Cipher{{Encr: alg.EncrAESGCM16, Bits: 128}}, PRF: []alg.PRF{alg.PRFHMACSHA256}, KE: []alg.KE{alg.KEX25519},
	}}
	return r
}

// certRule is the rule of a peer that proves itself by a certificate.
func certRule(issuer *credtest.Cert, name string) (*pad.Rule, error) {
	key, policy := credtest.Key("p256", 0), cred.Policy{Hashes: []ikev2.HashID{ikev2.HashSHA256}}
	own, err := cred.NewOwn([]*x509.Certificate{issuer.Issue(name, key, credtest.Names(name)).Certificate}, key, policy)
	if err != nil {
		return nil, err
	}
	trust, err := cred.NewTrust(cred.TrustConfig{CAs: []*x509.Certificate{issuer.Certificate}, Policy: policy})
	if err != nil {
		return nil, err
	}
	r := newRule("")
	r.LocalAuth, r.RemoteAuth, r.Own, r.Trust = pad.Cert, pad.Cert, own, trust
	r.LocalID = pad.ID{Type: ikev2.IDFQDN, Data: name}
	r.RemoteIDs = pad.Patterns{{ID: pad.ID{Type: ikev2.IDFQDN, Data: "responder.example.com"}}}
	return r, nil
}

// readCA reads a certificate and its key, in this order.
func readCA(file string) (*credtest.Cert, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	first, rest := pem.Decode(b)
	second, _ := pem.Decode(rest)
	if first == nil || second == nil {
		return nil, fmt.Errorf("%s: want a certificate and a key", file)
	}
	c, err := x509.ParseCertificate(first.Bytes)
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(second.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a key that does not sign", file)
	}
	return &credtest.Cert{Certificate: c, Key: key}, nil
}

func (l *load) wanted(p *peer) []sa.ChildRequest {
	if !*child {
		return nil
	}
	sel := ipsec.Selector{Src: netip.PrefixFrom(p.at, 32), Dst: netip.PrefixFrom(l.to, 32)}
	req := []ipsec.Request{{Proto: ipsec.ESP, Mode: ipsec.Tunnel, Src: p.at, Dst: l.to, ReqID: 1}}
	return []sa.ChildRequest{{Policy: sa.Policy{Out: &ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: req}}}}
}

// do carries out outputs; p is locked.
func (l *load) do(p *peer, outs []sa.Output) {
	for _, o := range outs {
		switch o := o.(type) {
		case sa.Send:
			l.send(o.Local, o.Remote, o.Data)
		case sa.NeedSPI:
			p.spis++
			l.do(p, p.sa.ChildSPI(time.Now(), o.Token, 0x10000000+p.spis, nil))
		case sa.InstallChild:
			if *child {
				l.ready(p)
			}
		case sa.Established:
			if !*child {
				l.ready(p)
			}
		case sa.Rekeyed:
			l.answered.Add(1)
		case sa.Failed:
			if l.lost.Add(1) <= 3 {
				fmt.Fprintf(os.Stderr, "%v: %v\n", p.at, o.Err)
			}
			if !p.up {
				l.finished()
			}
		case sa.ChildFailed:
			fmt.Fprintf(os.Stderr, "%v: child SA: %v\n", p.at, o.Err)
			os.Exit(1)
		}
	}
}

func (l *load) ready(p *peer) {
	if !p.up {
		p.up = true
		l.up.Add(1)
		l.finished()
	}
}

func (l *load) finished() {
	<-l.slots
	if l.up.Load()+l.lost.Load() == int64(*number) {
		close(l.done)
	}
}

func (l *load) send(local, remote netip.AddrPort, b []byte) {
	if local.Port() == 4500 && len(b) > 1 {
		b = append(make([]byte, 4, 4+len(b)), b...)
	}
	// What the socket does not take is lost, as on a wire.
	_, _ = l.conns[local.Port()].WriteTo(b, &ipv4.ControlMessage{Src: local.Addr().AsSlice()}, net.UDPAddrFromAddrPort(remote))
}

func (l *load) receive(port uint16, c *ipv4.PacketConn) {
	b := make([]byte, 65535)
	for {
		n, cm, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		at, _ := netip.AddrFromSlice(cm.Dst.To4())
		i := num(at) - l.base
		data := b[:n]
		if port == 4500 {
			if n < 4 || binary.BigEndian.Uint32(b) != 0 {
				continue
			}
			data = b[4:n]
		}
		if i >= uint32(len(l.peers)) {
			continue // an answer to the flood
		}
		p, ua := l.peers[i], from.(*net.UDPAddr).AddrPort()
		p.mu.Lock()
		l.do(p, p.sa.Receive(time.Now(), sa.Datagram{
			Local: netip.AddrPortFrom(at, port), Remote: netip.AddrPortFrom(ua.Addr().Unmap(), ua.Port()), Data: append([]byte(nil), data...),
		}))
		p.mu.Unlock()
	}
}

// ticks looks after retransmissions and liveness.
func (l *load) ticks() {
	for now := range time.Tick(100 * time.Millisecond) {
		for _, p := range l.peers {
			p.mu.Lock()
			if d := p.sa.Deadline(); !d.IsZero() && !d.After(now) {
				l.do(p, p.sa.Tick(time.Now()))
			}
			p.mu.Unlock()
		}
	}
}

// ask has 50 peers a second rekey their IKE SA for the length of the flood, and
// returns how many.
func (l *load) ask() int {
	start, n := time.Now(), 0
	for range time.Tick(20 * time.Millisecond) {
		if time.Since(start) > *during || n == len(l.peers) {
			return n
		}
		// From all over the range.
		p := l.peers[n*7919%len(l.peers)]
		n++
		p.mu.Lock()
		l.do(p, p.sa.Rekey(time.Now()))
		p.mu.Unlock()
	}
	return n
}

// flood sends IKE_SA_INIT requests with ever new SPIs from ever new addresses, none
// of which goes on, and returns how many.
func (l *load) flood(rule *pad.Rule) (int, error) {
	from, err := netip.ParseAddr(*strange)
	if err != nil {
		return 0, err
	}
	raw, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_RAW)
	if err != nil {
		return 0, err
	}
	defer syscall.Close(raw)
	var msg []byte
	x := sa.NewInitiator(sa.Config{Local: netip.AddrPortFrom(from, 500), Remote: netip.AddrPortFrom(l.to, 500), Host: l}, rule)
	for _, o := range x.Start(time.Now()) {
		if s, ok := o.(sa.Send); ok {
			msg = s.Data
		}
	}
	// IPv4 header (RFC 791) and UDP header without a checksum; the kernel fills in
	// length, identification and checksum of the first.
	b := make([]byte, 28+len(msg))
	b[0], b[8], b[9] = 0x45, 64, 17
	copy(b[16:], l.to.AsSlice())
	binary.BigEndian.PutUint16(b[20:], 500)
	binary.BigEndian.PutUint16(b[22:], 500)
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(msg)))
	copy(b[28:], msg)
	dst := &syscall.SockaddrInet4{Addr: l.to.As4()}
	sent, start := 0, time.Now()
	for time.Since(start) < *during {
		for want := int(time.Since(start).Seconds() * float64(*floods)); sent < want; sent++ {
			copy(b[12:], addr(num(from)+rand.Uint32N(1<<16)).AsSlice())
			binary.BigEndian.PutUint64(b[28:], rand.Uint64()|1)
			if err := syscall.Sendto(raw, b, 0, dst); err != nil && !errors.Is(err, syscall.ENOBUFS) {
				return sent, err
			}
		}
		time.Sleep(time.Millisecond)
	}
	return sent, nil
}

func num(a netip.Addr) uint32 { return binary.BigEndian.Uint32(a.AsSlice()) }

func addr(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

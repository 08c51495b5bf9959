package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/frag"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
)

// planeEnd is a Plane with databases of its own.
type planeEnd struct {
	*Plane
	t     testing.TB
	sad   *sad.DB
	spd   *spd.DB
	mtu   int
	needs []sad.OutKey
}

func newPlane(t testing.TB, byDefault ipsec.Action, local ...netip.Addr) *planeEnd {
	t.Helper()
	e := &planeEnd{t: t, sad: sad.NewDB(), spd: spd.NewDB(), mtu: 1500}
	p, err := NewPlane(PlaneConfig{
		SAD: e.sad, SPD: e.spd, Default: byDefault, Flows: 1024,
		IsLocal: func(a netip.Addr) bool {
			for _, l := range local {
				if l == a {
					return true
				}
			}
			return false
		},
		PathMTU: func(netip.Addr) int { return e.mtu },
		NeedSA:  func(_ *spd.Entry, k sad.OutKey, _ ipsec.Flow) { e.needs = append(e.needs, k) },
	})
	if err != nil {
		t.Fatal(err)
	}
	e.Plane = p
	return e
}

func (e *planeEnd) policy(p ipsec.Policy) {
	e.t.Helper()
	ed := e.spd.Edit()
	if _, err := ed.Add(&p, time.Now()); err != nil {
		e.t.Fatal(err)
	}
	if err := ed.Commit(); err != nil {
		e.t.Fatal(err)
	}
}

func (e *planeEnd) sa(p *ipsec.SAParams) {
	e.t.Helper()
	s, err := sad.New(p, time.Now())
	if err != nil {
		e.t.Fatal(err)
	}
	e.sad.Insert(s)
}

// planes makes both ends of p. SAs is false where they are to come later.
func (p *pair) planes(t testing.TB, sas bool) (a, b *planeEnd) {
	t.Helper()
	a, b = newPlane(t, ipsec.Bypass, p.src), newPlane(t, ipsec.Bypass, p.dst)
	sel := ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}
	a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	b.policy(ipsec.Policy{Dir: ipsec.In, Sel: sel, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	if sas {
		a.sa(p.params())
		b.sa(p.params())
	}
	return a, b
}

// roomy is ip with the room that Apply wants.
func roomy(ip []byte) Packet {
	buf := make([]byte, Headroom+len(ip)+Tailroom)
	copy(buf[Headroom:], ip)
	return Packet{buf, Headroom, len(ip)}
}

// tight is ip with nothing around it.
func tight(ip []byte) Packet {
	b := bytes.Clone(ip)
	return Packet{b[:len(b):len(b)], 0, len(b)}
}

func wantResult(t *testing.T, what string, r Result, v Verdict, packets int) {
	t.Helper()
	if r.Verdict != v || len(r.Packets) != packets {
		t.Fatalf("%s: %v (%v) with %d packets, want %v with %d", what, r.Verdict, r.Reason, len(r.Packets), v, packets)
	}
}

func wantDrop(t *testing.T, what string, r Result, why Counter) {
	t.Helper()
	if r.Verdict != Dropped || r.Reason != why || len(r.Packets) != 0 {
		t.Fatalf("%s: %v (%v) with %d packets, want dropped (%v)", what, r.Verdict, r.Reason, len(r.Packets), why)
	}
}

// TestPlane: packets of every mode go through two Planes unchanged, with room or
// without, and once.
func TestPlane(t *testing.T) {
	for name, p := range pairs() {
		t.Run(name, func(t *testing.T) {
			p := gcm(p)
			a, b := p.planes(t, true)
			now := time.Now()
			for _, n := range []int{0, 1, 15, 100, 1300} {
				for _, room := range []func([]byte) Packet{roomy, tight} {
					ip := udpPacket(p.in, p.out, 1, 2, n)
					r := a.Apply(room(ip), now)
					wantResult(t, "apply", r, Protected, 1)
					sealed := bytes.Clone(r.Packets[0].Bytes())
					var i packet.Info
					if !packet.Decode(sealed, &i) || i.Src != p.src || i.Dst != p.dst || i.Len != len(sealed) || n >= 15 && bytes.Contains(sealed, ip[len(ip)-n:]) {
						t.Fatalf("payload of %d: left as %x", n, sealed)
					}
					r = b.Permit(room(sealed), now)
					wantResult(t, "permit", r, Protected, 1)
					got := r.Packets[0].Bytes()
					if p.encap != nil && p.mode == ipsec.Transport {
						got, ip = got[len(got)-8-n:], ip[len(ip)-8-n:] // the IP header is a new one
					}
					if !bytes.Equal(got, ip) {
						t.Fatalf("payload of %d:\ngot  %x\nwant %x", n, got, ip)
					}
					wantDrop(t, "again", b.Permit(room(sealed), now), DropInReplay)
					bad := bytes.Clone(sealed)
					bad[len(bad)-1] ^= 1
					a.Apply(room(ip), now) // so that the number of bad is new
					wantDropped := b.Permit(room(bad), now)
					if wantDropped.Verdict != Dropped {
						t.Fatalf("flipped bit: %v", wantDropped.Verdict)
					}
				}
			}
		})
	}
}

// TestPlaneInPlace: with the room that is asked for, results lie in the
// caller's buffer, and what is bypassed keeps the octets around it.
func TestPlaneInPlace(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, b := p.planes(t, true)
	pk := roomy(udpPacket(p.in, p.out, 1, 2, 300))
	r := a.Apply(pk, time.Now())
	wantResult(t, "apply", r, Protected, 1)
	if o := r.Packets[0]; &o.Buf[0] != &pk.Buf[0] || o.Off >= pk.Off {
		t.Errorf("sealed at %d of another buffer, or not in front of %d", o.Off, pk.Off)
	}
	r = b.Permit(r.Packets[0], time.Now())
	wantResult(t, "permit", r, Protected, 1)
	if o := r.Packets[0]; &o.Buf[0] != &pk.Buf[0] || o.Off != pk.Off || o.Len != pk.Len {
		t.Errorf("opened to %d+%d, want %d+%d of the same buffer", o.Off, o.Len, pk.Off, pk.Len)
	}
	for _, off := range []int{Headroom, 14} {
		ip := udpPacket(a4, b4, 1, 2, 300)
		other := Packet{make([]byte, off+len(ip)+Tailroom), off, len(ip)}
		for k := range other.Buf {
			other.Buf[k] = byte(k)
		}
		copy(other.Bytes(), ip)
		was := bytes.Clone(other.Buf)
		for what, f := range map[string]func(Packet, time.Time) Result{"apply": a.Apply, "permit": b.Permit, "fragreceive": b.FragReceive} {
			r = f(other, time.Now())
			wantResult(t, what, r, Bypassed, 1)
			if o := r.Packets[0]; &o.Buf[0] != &other.Buf[0] || o.Off != other.Off || o.Len != other.Len || !bytes.Equal(o.Buf, was) {
				t.Errorf("%s at %d: bypassed packet or what is around it changed", what, off)
			}
		}
	}
}

// TestPlaneJudges: what policy does not expect is dropped for the right reason,
// and what has to pass passes.
func TestPlaneJudges(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, b := p.planes(t, true)
	b.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(ib4), Dst: prefix(ia4)}, Action: ipsec.Discard})
	a.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(ib4), Dst: prefix(ia4)}, Action: ipsec.Discard})
	now := time.Now()
	clear := udpPacket(p.in, p.out, 1, 2, 9)
	wantDrop(t, "clear", b.Permit(roomy(clear), now), DropInClear)
	wantDrop(t, "discard in", b.Permit(roomy(udpPacket(ib4, ia4, 1, 2, 9)), now), DropInDiscard)
	wantDrop(t, "discard out", a.Apply(roomy(udpPacket(ib4, ia4, 1, 2, 9)), now), DropOutDiscard)
	wantDrop(t, "no IP in", b.Permit(roomy([]byte{0x12}), now), DropInMalformed)
	wantDrop(t, "no IP out", a.Apply(roomy(nil), now), DropOutMalformed)
	for _, pk := range []Packet{{make([]byte, 10), -1, 5}, {make([]byte, 10), 5, -1}, {make([]byte, 10), 6, 5}, {make([]byte, 10), 11, 0}, {nil, 0, 1}, {make([]byte, 70000), 0, 70000}} {
		wantDrop(t, "outside of its buffer", a.Apply(pk, now), DropOutMalformed)
		wantDrop(t, "outside of its buffer", b.Permit(pk, now), DropInMalformed)
		wantDrop(t, "outside of its buffer", b.FragReceive(pk, now), DropInMalformed)
	}

	// What the SA carries, but policy wants by another.
	x := newPlane(t, ipsec.Bypass, p.src)
	x.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(b4), Dst: prefix(a4)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	x.sa(p.params())
	r := x.Apply(roomy(udpPacket(b4, a4, 1, 2, 9)), now)
	wantResult(t, "apply", r, Protected, 1)
	wantDrop(t, "policy mismatch", b.Permit(tight(r.Packets[0].Bytes()), now), DropInPolicy)

	// To port 4500 of ours come IKE and keepalives too, and to that of others anything.
	ike := udpPacket(a4, b4, 4500, 4500, 40)
	binary.BigEndian.PutUint32(ike[28:], 0)
	keepalive := udpPacket(a4, b4, 4500, 4500, 1)
	keepalive[28] = 0xff
	for what, ip := range map[string][]byte{"IKE": ike, "keepalive": keepalive, "ESP for another host": udpPacket(a4, ia4, 4500, 4500, 40), "ND": neighbour()} {
		wantResult(t, what+" in", b.Permit(roomy(ip), now), Bypassed, 1)
		if what != "ESP for another host" {
			wantResult(t, what+" out", a.Apply(roomy(ip), now), Bypassed, 1)
		}
	}
	if s := a.Stats(); s[DropOutDiscard] != 1 || s[DropOutMalformed] != 7 {
		t.Errorf("counters %v", s.nonzero())
	}
}

// neighbour is a neighbour solicitation.
func neighbour() []byte {
	b := make([]byte, 40+24)
	packet.PutHeader(b, netip.MustParseAddr("fe80::1"), netip.MustParseAddr("ff02::1:ff00:2"), protoICMPv6, len(b), 255)
	b[40] = 135
	return b
}

// TestPlaneFragments: results above the path MTU leave as fragments, and come
// together at the other end, by Permit alone or behind FragReceive; a datagram
// that has to be judged whole is joined before, and cut again where it is bypassed.
func TestPlaneFragments(t *testing.T) {
	now := time.Now()
	for _, name := range []string{"tunnel 4 in 4", "udp tunnel 6 in 6", "transport 4"} {
		for _, first := range []bool{false, true} {
			p := gcm(pairs()[name])
			a, b := p.planes(t, true)
			a.mtu = 600
			ip := udpPacket(p.in, p.out, 1, 2, 1100)
			if !p.in.Is6() {
				packet.ClearDF(ip)
				packet.FixIPv4Checksum(ip)
			}
			r := a.Apply(roomy(ip), now)
			if p.in.Is6() {
				a.mtu = 1300 // IPv6 below 1280 is cut, above it is told
			}
			if r.Verdict != Protected || len(r.Packets) < 2 {
				t.Fatalf("%s: %v with %d packets", name, r.Verdict, len(r.Packets))
			}
			var got []byte
			for k := range r.Packets {
				f := tight(r.Packets[k].Bytes())
				last := k == len(r.Packets)-1
				if first {
					q := b.FragReceive(f, now)
					if !last {
						wantResult(t, name, q, Incomplete, 0)
						continue
					}
					wantResult(t, name, q, Bypassed, 1)
					f = q.Packets[0]
				}
				q := b.Permit(f, now)
				if !last {
					wantResult(t, name, q, Incomplete, 0)
					continue
				}
				wantResult(t, name, q, Protected, 1)
				got = bytes.Clone(q.Packets[0].Bytes())
			}
			if n := 1108; !bytes.Equal(got[len(got)-n:], ip[len(ip)-n:]) {
				t.Errorf("%s: payload changed on its way", name)
			}
			// The same fragment twice, and another in its place.
			f := tight(r.Packets[0].Bytes())
			wantResult(t, "first", b.FragReceive(f, now), Incomplete, 0)
			wantDrop(t, "duplicate", b.FragReceive(f, now), DropInFragment)
			f.Buf[len(f.Buf)-1] ^= 1
			wantDrop(t, "overlap", b.Permit(f, now), DropInFragment)
			if d := b.FragmentDrops(); d["duplicate"] != 1 || d["overlap"] != 1 {
				t.Errorf("%v", d)
			}
		}
	}

	p := gcm(pairs()["transport 4"])
	a, b := p.planes(t, true)
	ip := udpPacket(p.in, p.out, 1, 2, 1000)
	packet.ClearDF(ip)
	packet.FixIPv4Checksum(ip)
	var i packet.Info
	packet.Decode(ip, &i)
	var rs []Verdict
	if err := frag.Split(ip, &i, 600, 7, func(f []byte) error {
		r := a.Apply(tight(f), now)
		rs = append(rs, r.Verdict)
		if r.Verdict == Protected {
			q := b.Permit(tight(r.Packets[0].Bytes()), now)
			wantResult(t, "permit", q, Protected, 1)
			if got := q.Packets[0].Bytes(); !bytes.Equal(got[20:], ip[20:]) {
				t.Error("payload changed on its way")
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(rs) != 2 || rs[0] != Incomplete || rs[1] != Protected {
		t.Errorf("fragments in transport mode: %v", rs)
	}
}

// TestPlaneTooBig: the sender of what does not fit is answered, and what the
// answer says fits.
func TestPlaneTooBig(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, _ := p.planes(t, true)
	r := a.Apply(roomy(udpPacket(p.in, p.out, 1, 2, 1472)), time.Now())
	wantResult(t, "too long", r, TooBig, 0)
	var i packet.Info
	if !packet.Decode(r.Reply, &i) || i.Proto != 1 || i.Dst != p.in || r.Reply[20] != 3 || r.Reply[21] != 4 {
		t.Fatalf("reply %x", r.Reply)
	}
	mtu := int(binary.BigEndian.Uint16(r.Reply[26:]))
	r = a.Apply(roomy(udpPacket(p.in, p.out, 1, 2, mtu-28)), time.Now())
	wantResult(t, "as told", r, Protected, 1)
	if n := r.Packets[0].Len; n > 1500 || n < 1497 || r.Reply != nil {
		t.Errorf("%d octets leave", n)
	}
}

// TestPlaneHolds: packets wait for an SA and for its keys, and go on when these
// have come, or are dropped when they do not.
func TestPlaneHolds(t *testing.T) {
	p := gcm(pairs()["tunnel 4 in 4"])
	a, b := p.planes(t, false)
	now := time.Now()
	ip := udpPacket(p.in, p.out, 1, 2, 33)
	wantResult(t, "without SA", a.Apply(roomy(ip), now), Held, 0)
	if len(a.needs) != 1 || a.Held() != 1 {
		t.Fatalf("asked for %v, %d held", a.needs, a.Held())
	}
	a.Released(now, func(ipsec.Direction, Result) { t.Error("released without SA") })
	a.sa(p.params())
	a.Installed(a.needs[0])
	select {
	case <-a.Wake():
	default:
		t.Fatal("not woken")
	}
	larval := sad.NewLarval(p.params(), now)
	b.sad.Insert(larval)
	n := 0
	a.Released(now, func(d ipsec.Direction, r Result) {
		n++
		wantResult(t, "released", r, Protected, 1)
		if d != ipsec.Out {
			t.Error(d)
		}
		wantResult(t, "without keys", b.Permit(tight(r.Packets[0].Bytes()), now), Held, 0)
	})
	full, err := sad.New(p.params(), now)
	if err != nil {
		t.Fatal(err)
	}
	b.sad.Replace(larval, full)
	b.Released(now, func(d ipsec.Direction, r Result) {
		n++
		wantResult(t, "opened late", r, Protected, 1)
		if d != ipsec.In || !bytes.Equal(r.Packets[0].Bytes(), ip) {
			t.Errorf("%v %x", d, r.Packets[0].Bytes())
		}
	})
	if n != 2 {
		t.Errorf("%d packets went on, want 2", n)
	}

	a, _ = p.planes(t, false)
	for k := range HoldLimit + 1 {
		wantResult(t, "held", a.Apply(roomy(udpPacket(p.in, p.out, 1, uint16(k), 33)), now), Held, 0)
	}
	a.Failed(a.needs[0])
	if s := a.Stats(); a.Held() != 0 || s[DropOutHold] != HoldLimit+1 {
		t.Errorf("%d held, %v", a.Held(), s.nonzero())
	}
}

func TestPlaneConfig(t *testing.T) {
	good := PlaneConfig{SAD: sad.NewDB(), SPD: spd.NewDB(), Default: ipsec.Bypass, IsLocal: func(netip.Addr) bool { return false }}
	if _, err := NewPlane(good); err != nil {
		t.Error(err)
	}
	for want, f := range map[string]func(*PlaneConfig){
		"Default":  func(c *PlaneConfig) { c.Default = ipsec.Protect },
		"IsLocal":  func(c *PlaneConfig) { c.IsLocal = nil },
		"required": func(c *PlaneConfig) { c.SAD = nil },
		"Flows":    func(c *PlaneConfig) { c.Flows = 100 },
		"64":       func(c *PlaneConfig) { c.Flows = 32 },
	} {
		c := good
		f(&c)
		if _, err := NewPlane(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want one that tells of %s", err, want)
		}
	}
}

// TestPlaneNoAlloc: packets that go the ordinary way cost no allocation.
func TestPlaneNoAlloc(t *testing.T) {
	for name, p := range pairs() {
		for _, s := range frugal(t) {
			p.suite = s
			a, b := p.planes(t, true)
			q := p.params()
			q.SPI, q.ReplayWindow = 0x2000, 0
			b.sa(q)
			c, _ := p.planes(t, false)
			c.sa(q)
			ip := udpPacket(p.in, p.out, 1, 2, 1300)
			now := time.Now()
			sealed := bytes.Clone(c.Apply(roomy(ip), now).Packets[0].Bytes())
			pk, in := roomy(ip), roomy(sealed)
			if n := testing.AllocsPerRun(100, func() {
				copy(pk.Bytes(), ip)
				if r := a.Apply(pk, now); r.Verdict != Protected {
					t.Fatal(r.Verdict, r.Reason)
				}
			}); n != 0 {
				t.Errorf("%s %v apply: %v allocations a packet", name, s, n)
			}
			if n := testing.AllocsPerRun(100, func() {
				copy(in.Bytes(), sealed)
				if r := b.Permit(in, now); r.Verdict != Protected {
					t.Fatal(r.Verdict, r.Reason)
				}
			}); n != 0 {
				t.Errorf("%s %v permit: %v allocations a packet", name, s, n)
			}
		}
	}
}

// FuzzPlane: no packet makes a Plane panic, answer outside of a buffer, or pass
// what the default discards; only IKE and neighbour discovery are bypassed.
func FuzzPlane(f *testing.F) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, _ := p.planes(f, true)
	f.Add(udpPacket(p.in, p.out, 1, 2, 40))
	f.Add(bytes.Clone(a.Apply(roomy(udpPacket(p.in, p.out, 1, 2, 40)), time.Now()).Packets[0].Bytes()))
	f.Add(neighbour())
	f.Add([]byte{0x45})
	x, y := newPlane(f, ipsec.Discard, p.src), newPlane(f, ipsec.Discard, p.dst)
	x.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	y.policy(ipsec.Policy{Dir: ipsec.In, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
	x.sa(p.params())
	y.sa(p.params())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 65535 {
			return
		}
		for what, do := range map[string]func(Packet, time.Time) Result{"apply": x.Apply, "permit": y.Permit, "fragreceive": y.FragReceive} {
			for _, room := range []func([]byte) Packet{roomy, tight} {
				r := do(room(b), time.Now())
				passes := r.Verdict == Bypassed || r.Verdict == Protected
				if passes != (len(r.Packets) > 0) || r.Verdict == Dropped && !r.Reason.drop() {
					t.Fatalf("%s: %v (%v) with %d packets", what, r.Verdict, r.Reason, len(r.Packets))
				}
				for k := range r.Packets {
					var i packet.Info
					if !packet.Decode(r.Packets[k].Bytes(), &i) {
						t.Fatalf("%s: no IP packet: %x", what, r.Packets[k].Bytes())
					}
					ike := i.Proto == protoUDP && (i.SrcPort == 500 || i.SrcPort == 4500 || i.DstPort == 500 || i.DstPort == 4500)
					if r.Verdict == Bypassed && what != "fragreceive" && !ike && !isND(&i) {
						t.Fatalf("%s: passed under default discard: %x", what, r.Packets[k].Bytes())
					}
				}
			}
		}
	})
}

// BenchmarkPlane is one packet at a time, in place, AES-GCM in an IPv4 tunnel.
func BenchmarkPlane(b *testing.B) {
	p := gcm(pairs()["tunnel 4 in 4"])
	for _, n := range []int{64, 1400} {
		ip := udpPacket(p.in, p.out, 1, 2, n-28)
		now := time.Now()
		x, y := p.planes(b, true)
		q := p.params()
		q.SPI, q.ReplayWindow = 0x2000, 0
		y.sa(q)
		z, _ := p.planes(b, false)
		z.sa(q)
		sealed := bytes.Clone(z.Apply(roomy(ip), now).Packets[0].Bytes())
		for what, do := range map[string]struct {
			b []byte
			f func(Packet, time.Time) Result
		}{"apply": {ip, x.Apply}, "permit": {sealed, y.Permit}} {
			b.Run(fmt.Sprint(what, n), func(b *testing.B) {
				pk := roomy(do.b)
				b.ReportAllocs()
				for b.Loop() {
					copy(pk.Bytes(), do.b)
					if r := do.f(pk, now); r.Verdict != Protected {
						b.Fatal(r.Verdict, r.Reason)
					}
				}
			})
		}
	}
}

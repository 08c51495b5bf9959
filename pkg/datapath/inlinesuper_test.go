package datapath

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/ipsec"
)

// memLow is the low side of a node: what is written to it.
type memLow struct {
	fs   [][]byte
	offl []tap.Offload
}

func (m *memLow) ReadBatch([]tap.Frame) (int, error) { panic("not used") }

func (m *memLow) WriteBatch(fs []tap.Frame) (int, error) {
	for _, f := range fs {
		clear(f.Buf[f.Off-tap.HeadroomMin : f.Off]) // as the real one may
	}
	for _, f := range fs {
		m.fs, m.offl = append(m.fs, bytes.Clone(f.Buf[f.Off:f.Off+f.Len])), append(m.offl, f.Offload)
	}
	return len(fs), nil
}

// bump makes a node one.
func (n *node) bump() *memLow {
	low := &memLow{}
	n.e.c.Low = low
	return low
}

// fromNIC lets frames come in over the interface as one batch, and returns what the
// kernel got: whole frames.
func (n *node) fromNIC(fs ...*tap.Frame) [][]byte {
	n.t.Helper()
	n.tap, n.offl = nil, nil
	w := n.e.in[0]
	now := time.Now()
	for _, f := range fs {
		w.bumped(f, now)
	}
	if err := w.flush(now); err != nil {
		n.t.Fatal(err)
	}
	return n.tap
}

// tagged is f with a VLAN tag.
func tagged(f *tap.Frame) *tap.Frame {
	g := &tap.Frame{Buf: make([]byte, len(f.Buf)+4), Off: f.Off, Len: f.Len + 4, Offload: f.Offload}
	b := f.Buf[f.Off : f.Off+f.Len]
	copy(g.Buf[g.Off:], slices.Concat(b[:12], []byte{0x81, 0, 0, 7}, b[12:]))
	if g.Offload.NeedsCsum {
		g.Offload.CsumStart += 4
	}
	return g
}

// measured is f as package bump gives it.
func measured(t *testing.T, f *tap.Frame) *tap.Frame {
	t.Helper()
	if !f.Offload.Measure(f.Buf[f.Off : f.Off+f.Len]) {
		t.Fatalf("no super-frame: %+v", f.Offload)
	}
	return f
}

// Super-frames that policy bypasses pass a bump as they are, in their place among
// the frames of the flow; they count as what they stand for.
func TestInlineSuperBypassed(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			a := newNode(t, a4, a6)
			low := a.bump()
			src, dst := a4, b4
			if v6 {
				src, dst = a6, b6
			}
			spec := superSpec{udp: udp, size: 1000, n: 4500, flags: 0x18, options: !udp}
			ip, o := spec.build(src, dst)
			first, last := frameOf(udpPacket(src, dst, 4321, 80, 10), tap.Offload{}), frameOf(udpPacket(src, dst, 4321, 80, 20), tap.Offload{})
			super := measured(t, frameOf(ip, o))
			withTag := measured(t, tagged(super))
			in := []*tap.Frame{first, super, withTag, last}
			want := make([][]byte, len(in))
			for k, f := range in {
				want[k] = bytes.Clone(f.Buf[f.Off : f.Off+f.Len])
			}
			a.sendFrames(in...)
			if len(low.fs) != len(want) {
				t.Fatalf("v6 %v, udp %v: %d frames left, want %d; %v", v6, udp, len(low.fs), len(want), a.e.Stats().nonzero())
			}
			for k := range want {
				if !bytes.Equal(low.fs[k], want[k]) || low.offl[k] != in[k].Offload {
					t.Errorf("v6 %v, udp %v: frame %d: %+v, want %+v\ngot  %x\nwant %x", v6, udp, k, low.offl[k], in[k].Offload, low.fs[k][:80], want[k][:80])
				}
			}
			a.wantCount(map[Counter]uint64{OutBypassed: 12})

			// And the other way.
			for _, f := range in {
				f.Offload.HdrLen = 0 // so that memTAP leaves it whole
			}
			super.Offload.Measure(super.Buf[super.Off : super.Off+super.Len])
			n := packets(super)
			super.Offload.HdrLen = 0
			got := a.fromNIC(in...)
			if n != 5 || len(got) != len(want) {
				t.Fatalf("v6 %v, udp %v: %d frames came in, want %d; a super-frame of %d packets, want 5", v6, udp, len(got), len(want), n)
			}
			for k := range want {
				if !bytes.Equal(got[k], want[k]) || a.offl[k] != in[k].Offload {
					t.Errorf("v6 %v, udp %v: frame %d from the interface: %+v, want %+v", v6, udp, k, a.offl[k], in[k].Offload)
				}
			}
		}
	}
}

// Super-frames of a flow that policy protects leave as ESP, segment by segment,
// each behind the frame's link header where that belongs to the result; and what
// arrives are the segments.
func TestInlineSuperProtected(t *testing.T) {
	for _, name := range []string{"transport 4", "transport 6", "tunnel 4 in 4", "udp transport 4", "udp tunnel 4 in 4"} {
		for _, tag := range []bool{false, true} {
			p := gcm(pairs()[name])
			a, b, _, _ := p.nodes(t)
			low := a.bump()
			b.bump()
			spec := superSpec{size: 1200, n: 64000, flags: 0x18, options: true}
			ip, o := spec.build(p.in, p.out)
			want := reference(t, ip, spec.size)
			f := frameOf(ip, o)
			if tag {
				f = tagged(f)
			}
			link := bytes.Clone(f.Buf[f.Off : f.Off+f.Len-len(ip)])
			sent := a.sendFrames(f)
			if p.mode == ipsec.Transport || tag {
				if len(sent) != 0 {
					t.Errorf("%s, tag %v: %d packets left without their link header", name, tag, len(sent))
				}
				for _, f := range low.fs {
					if !bytes.Equal(f[:len(link)], link) {
						t.Fatalf("%s, tag %v: link header %x, want %x", name, tag, f[:len(link)], link)
					}
					sent = append(sent, f[len(link):])
				}
			}
			if len(sent) != len(want) {
				t.Fatalf("%s, tag %v: %d packets left, want %d; %v", name, tag, len(sent), len(want), a.e.Stats().nonzero())
			}
			var fs []*tap.Frame
			for _, s := range sent {
				f := frameOf(s, tap.Offload{})
				if tag {
					f = tagged(f)
				}
				fs = append(fs, f)
			}
			got := b.fromNIC(fs...)
			if len(got) != len(want) {
				t.Fatalf("%s, tag %v: %d packets arrived, want %d; %v", name, tag, len(got), len(want), b.e.Stats().nonzero())
			}
			for k := range want {
				g, w := got[k][len(link):], want[k]
				if p.encap != nil && p.mode == ipsec.Transport {
					g, w = g[packet.IPv4Len:], w[packet.IPv4Len:] // the IP header is a new one
				}
				if !bytes.Equal(g, w) {
					t.Fatalf("%s, tag %v: segment %d:\ngot  %x\nwant %x", name, tag, k, g[:80], w[:80])
				}
			}
			a.wantCount(map[Counter]uint64{OutProtected: uint64(len(want))})
			b.wantCount(map[Counter]uint64{InProtected: uint64(len(want))})
		}
	}
}

// A super-frame in clear that policy wants protected is dropped whole, from
// either side of a policy of discard too.
func TestInlineSuperDropped(t *testing.T) {
	p := gcm(pairs()["transport 4"])
	_, b, _, _ := p.nodes(t)
	low := b.bump()
	b.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(b4), Dst: prefix(a4)}, Action: ipsec.Discard})
	spec := superSpec{size: 1000, n: 4500, flags: 0x18}
	ip, o := spec.build(p.in, p.out)
	if got := b.fromNIC(measured(t, frameOf(ip, o)), measured(t, tagged(frameOf(ip, o)))); len(got) != 0 {
		t.Errorf("%d frames in clear came in", len(got))
	}
	ip, o = spec.build(p.out, p.in)
	b.sendFrames(measured(t, frameOf(ip, o)))
	if len(low.fs) != 0 {
		t.Errorf("%d frames left that policy discards", len(low.fs))
	}
	b.wantCount(map[Counter]uint64{DropInClear: 10, DropOutDiscard: 5})
}

// ESP in UDP comes from the interface as super-frames, too, with a keepalive or a
// message of IKE among the datagrams.
func TestInlineTrain(t *testing.T) {
	p := gcm(pairs()["udp tunnel 4 in 4"])
	a, b, _, _ := p.nodes(t)
	b.bump()
	var sent [][]byte
	for k := range 5 {
		sent = append(sent, a.send(udpPacket(p.in, p.out, 1, 2, 300+k%2))...) // of one length once sealed
	}
	ike := append(make([]byte, 4), "a message of IKE"...)
	train := bytes.Clone(sent[0])
	for _, s := range sent[1:] {
		if len(s) != len(sent[0]) {
			t.Fatalf("packets of %d and %d octets", len(sent[0]), len(s))
		}
		train = append(train, s[28:]...)
	}
	train = append(train, ike...)
	packet.SetLen(train, len(train))
	packet.FixIPv4Checksum(train)
	train[24], train[25] = byte((len(train)-20)>>8), byte(len(train)-20)
	o := tap.Offload{NeedsCsum: true, GSOType: tap.GSOUDPL4, GSOSize: uint16(len(sent[0]) - 28), CsumStart: 34, CsumOffset: 6}
	for _, tag := range []bool{false, true} {
		f := frameOf(train, o)
		if tag {
			f = tagged(f)
		}
		got := b.fromNIC(measured(t, f))
		if want := map[bool]int{false: 5, true: 0}[tag]; len(got) != want { // the second time they are replayed
			t.Fatalf("tag %v: %d packets came in, want %d; %v", tag, len(got), want, b.e.Stats().nonzero())
		}
	}
	if len(b.udp) != 2 {
		t.Errorf("IKE got %q", b.udp)
	}
	b.wantCount(map[Counter]uint64{InProtected: 5, DropInReplay: 5, InIKE: 2})
}

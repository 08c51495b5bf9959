package datapath

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
)

// TestMonitor: a reader sees what a packet was and then what became of it, on
// both sides, ESP in UDP with headers too, and why it did not go on.
func TestMonitor(t *testing.T) {
	for _, name := range []string{"tunnel 4 in 4", "udp tunnel 6 in 6"} {
		t.Run(name, func(t *testing.T) {
			p := gcm(pairs()[name])
			a, b, _, _ := p.nodes(t)
			c, _, _, _ := p.nodes(t)
			see := watchNodes(t, a, b)
			ip := udpPacket(p.in, p.out, 1, 2, 50)
			f := &a.e.out.frames[0]
			out := func(ip []byte, version uint8) {
				f.Off, f.Len = headroom, etherLen+len(ip)
				putEther(f.Buf[headroom:], testMAC, version)
				copy(f.Buf[headroom+6:], testMAC)
				copy(f.Buf[headroom+etherLen:], ip)
				a.e.out.watch(f, time.Now())
				if err := a.e.out.flush(); err != nil {
					t.Fatal(err)
				}
			}
			in := func(outer []byte) {
				var i packet.Info
				packet.Decode(outer, &i)
				buf := make([]byte, bufSize)
				off := headroom + etherLen
				w := b.e.in[0]
				if p.encap == nil {
					copy(buf[off:], outer)
					w.watch(&wire.Packet{Buf: buf, Off: off, Len: len(outer)}, time.Now())
				} else {
					w = b.e.in[1]
					k := copy(buf[off:], outer[i.HdrLen+8:])
					w.train(&wire.Datagram{Buf: buf, Off: off, Len: k, Local: netip.AddrPortFrom(p.dst, 4500), Remote: netip.AddrPortFrom(p.src, 4500)}, time.Now())
				}
				if err := w.flush(time.Now()); err != nil {
					t.Fatal(err)
				}
			}
			sealed := c.send(ip)[0]
			out(ip, ip[0]>>4)
			a.e.out.watch(&tap.Frame{Buf: f.Buf, Off: headroom, Len: 5}, time.Now())
			in(sealed)
			in(sealed)
			got := see(4 + 2)
			what := func(f capture.Frame) string { return fmt.Sprint(f.Side, " ", f.Dir, " ", f.Comment) }
			if l := kinds(got, what); !slices.Equal(l, []string{"high out ", "low out ", "high out out_noise", "low in ", "high in ", "low in drop_in_replay"}) {
				t.Fatalf("%q", l)
			}
			if !bytes.Equal(got[0].Data[etherLen:], ip) || !bytes.Equal(got[4].Data[etherLen:], ip) {
				t.Error("clear packets differ")
			}
			for _, k := range []int{1, 3, 5} {
				line := got[k].Line(capture.LinkIP)
				want := fmt.Sprintf("%v > %v: ESP(spi=0x00001000,seq=0x1)", p.src, p.dst)
				if p.encap != nil {
					want = fmt.Sprintf("%v.4500 > %v.4500: UDP ESP(spi=0x00001000,seq=0x1)", p.src, p.dst)
				}
				if !strings.Contains(line, want) || !bytes.HasSuffix(sealed, got[k].Data[len(got[k].Data)-40:]) {
					t.Errorf("frame %d: %s, want %s", k, line, want)
				}
			}
		})
	}
}

// TestMonitorSent: what the key daemon has sent from port 4500 is there, with headers.
func TestMonitorSent(t *testing.T) {
	a := newNode(t, a4)
	see := watchNodes(t, a)
	msg := append(make([]byte, 4), make([]byte, 28)...)
	d := wire.Datagram{Buf: msg, Len: len(msg), Local: netip.AddrPortFrom(a4, 4500), Remote: netip.AddrPortFrom(b4, 4500)}
	a.e.Sent(&d, nil)
	a.e.Sent(&d, errGone)
	for k, f := range see(2) {
		want := fmt.Sprintf("%v.4500 > %v.4500: UDP", a4, b4)
		if line := f.Line(capture.LinkIP); f.Side != capture.Low || f.Dir != capture.Out || !strings.Contains(line, want) || f.Comment != []string{"", "udp_send_refused"}[k] || !bytes.HasSuffix(f.Data, msg) {
			t.Errorf("%v %v: %s, want %s", f.Side, f.Dir, line, want)
		}
	}
}

func kinds(fs []capture.Frame, what func(capture.Frame) string) (l []string) {
	for _, f := range fs {
		l = append(l, what(f))
	}
	return l
}

// watchNodes gives the nodes' workers a monitor with one reader, of which see
// returns the next frames.
func watchNodes(t *testing.T, nodes ...*node) (see func(n int) []capture.Frame) {
	h := capture.NewHub(capture.Interface{Name: "eth0", Link: capture.LinkIP}, capture.Interface{Name: "tap0", Link: capture.LinkEthernet})
	path := filepath.Join(t.TempDir(), "m")
	if err := h.Listen(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	for _, n := range nodes {
		if n.e.out.tape.Start() {
			t.Fatal("records without a reader")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	r, err := capture.Dial(ctx, path, capture.Both)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	for !h.Active() {
		if ctx.Err() != nil {
			t.Fatal("reader not seen")
		}
		time.Sleep(time.Millisecond)
	}
	for _, n := range nodes {
		n.e.c.Monitor = h
		n.e.out.tape.Hub = h
		n.e.out.tape.Start()
		for _, w := range n.e.in {
			w.tape.Hub = h
			w.tape.Start()
		}
	}
	return func(n int) (fs []capture.Frame) {
		for range n {
			f, err := r.Read()
			if err != nil {
				t.Fatalf("after %d frames: %v", len(fs), err)
			}
			f.Data = bytes.Clone(f.Data)
			fs = append(fs, f)
		}
		return fs
	}
}

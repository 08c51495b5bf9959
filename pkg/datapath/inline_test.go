package datapath

import (
	"encoding/hex"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/ipsec"
)

const macs = "020000000001020000000002"

func TestParseLink(t *testing.T) {
	for _, tt := range []struct {
		frame string
		n     int
		etype uint16
	}{
		{macs + "0800", 14, 0x0800},
		{macs + "0806", 14, 0x0806},
		{macs + "81000064" + "86dd", 18, 0x86dd},
		{macs + "88a80064" + "81000065" + "0800", 22, 0x0800},
		{macs + "8100000181000002810000038100000488b5", 30, 0x88b5},
		{macs + "810000018100000281000003810000048100000508" + "00", 0, 0}, // five
		{macs + "8100" + "0064", 0, 0},                                     // cut behind the tag
		{macs + "08", 0, 0},
		{"", 0, 0},
	} {
		b, err := hex.DecodeString(tt.frame)
		if err != nil {
			t.Fatal(err)
		}
		if n, etype := parseLink(b); n != tt.n || n != 0 && etype != tt.etype {
			t.Errorf("%s: %d octets, type %#04x; want %d, %#04x", tt.frame, n, etype, tt.n, tt.etype)
		}
	}
}

func FuzzParseLink(f *testing.F) {
	for _, s := range []string{macs + "0800", macs + "8100006486dd", macs + "88a80064"} {
		b, _ := hex.DecodeString(s)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, etype := parseLink(b)
		if n == 0 {
			return
		}
		if n < etherLen || n > maxLink || n > len(b) || tap.IsTag(etype) {
			t.Fatalf("%d octets of %d, type %#04x", n, len(b), etype)
		}
		// An answer to the frame goes where it came from, with its tags.
		var l linkHeader
		l.set(b[:n])
		out := make([]byte, maxLink+1)
		at := l.putReply(out, maxLink, 4)
		if string(out[at:at+6]) != string(b[6:12]) || string(out[at+6:at+12]) != string(b[:6]) || string(out[at+12:maxLink-2]) != string(b[12:n-2]) {
			t.Fatalf("answer %x to %x", out[at:maxLink], b[:n])
		}
	})
}

// sink is a low side that counts.
type sink struct{ frames int }

func (s *sink) ReadBatch([]tap.Frame) (int, error) { panic("not used") }
func (s *sink) WriteBatch(fs []tap.Frame) (int, error) {
	s.frames += len(fs)
	return len(fs), nil
}

// TestNoAllocInline: whole frames cost no allocation either, whatever becomes of them.
func TestNoAllocInline(t *testing.T) {
	p := gcm(pairs()["transport 4"])
	clear := udpPacket(p.in, p.out, 1, 2, 1300)
	other := append([]byte(nil), clear...)
	other[19]++ // another destination, which has no policy
	arp := make([]byte, 46)
	for name, k := range map[string]struct {
		ip        []byte
		etype     uint16
		protected bool
	}{"protected": {clear, etherIPv4, true}, "bypassed": {other, etherIPv4, false}, "not IP": {arp, 0x0806, false}} {
		a, b, _, _ := p.nodes(t)
		q := p.params() // without a window, so that one packet will do
		q.ReplayWindow, q.SPI = 0, 0x2000
		b.sa(q)
		c := newNode(t, p.src)
		c.policy(ipsec.Policy{Dir: ipsec.Out, Sel: ipsec.Selector{Src: prefix(p.in), Dst: prefix(p.out)}, Action: ipsec.Protect, Requests: []ipsec.Request{p.request()}})
		c.sa(q)
		in := k.ip
		if k.protected {
			in = c.send(k.ip)[0]
		}
		a.quiet, b.quiet = true, true
		low := new(sink)
		a.e.c.Low, b.e.c.Low = low, low
		now := time.Now()
		frame := func(buf, ip []byte) tap.Frame {
			copy(buf[headroom:], testMAC)
			copy(buf[headroom+6:], testMAC)
			buf[headroom+12], buf[headroom+13] = byte(k.etype>>8), byte(k.etype)
			copy(buf[headroom+etherLen:], ip)
			return tap.Frame{Buf: buf, Off: headroom, Len: etherLen + len(ip)}
		}
		outBuf, inBuf := make([]byte, bufSize), make([]byte, bufSize+maxLink)
		fs := make([]tap.Frame, 2)
		for what, f := range map[string]func(){
			"out": func() {
				fs[0] = frame(outBuf, k.ip)
				a.e.out.frame(&fs[0], now)
				if err := a.e.out.flush(); err != nil {
					t.Fatal(err)
				}
			},
			"in": func() {
				fs[1] = frame(inBuf, in)
				b.e.in[0].bumped(&fs[1], now)
				if err := b.e.in[0].flush(now); err != nil {
					t.Fatal(err)
				}
			},
		} {
			f()
			if n := testing.AllocsPerRun(100, f); n != 0 {
				t.Errorf("%s %s: %v allocations a frame", name, what, n)
			}
		}
		if low.frames != 102 || b.wrote != 102 {
			t.Errorf("%s: %d frames left and %d came in, want 102 each; %v, %v", name, low.frames, b.wrote, a.e.Stats().nonzero(), b.e.Stats().nonzero())
		}
	}
}

package tap

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

// A TUN is a TAP to the caller: super-frames and unfinished checksums both ways,
// an Ethernet header with the right type on everything read.
func TestTUN(t *testing.T) {
	eachMode(t, func(t *testing.T, mode string) {
		t.Run("write", func(t *testing.T) { testWriteOffload(t, Options{TUN: true, MAC: testMAC, Offload: mode}) })
		d := openTest(t, Options{TUN: true, MAC: testMAC, MTU: 1400, Offload: mode, ReadOffload: true})
		if d.Name() != "tun0" {
			t.Errorf("name: got %q, want tun0", d.Name())
		}
		if ifi, err := net.InterfaceByName(d.Name()); err != nil || ifi.Flags&net.FlagPointToPoint == 0 || len(ifi.HardwareAddr) != 0 {
			t.Errorf("got %+v, %v: no TUN", ifi, err)
		}
		sh(t, "ip addr add 198.51.100.1/24 dev "+d.Name())
		readUDPTrain(t, d, d.ReadSuper().UDP)
		readTCPStream(t, d, d.ReadSuper().TCP4)
		sh(t, "echo 0 >/proc/sys/net/ipv6/conf/"+d.Name()+"/disable_ipv6 && ip addr add 2001:db8::1/64 nodad dev "+d.Name())
		if got := sh(t, "ip -6 -br addr show scope link dev "+d.Name()); got != "" {
			t.Errorf("link-local address %s, want none", got)
		}
		c, err := net.Dial("udp6", "[2001:db8::2]:9")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		collect(t, d, func(f *Frame, i *packet.Info) bool {
			if i.Proto != unix.IPPROTO_UDP {
				return false
			}
			if b := f.Buf[f.Off:]; f.Len != etherLen+40+8+100 || b[12] != 0x86 || b[13] != 0xdd {
				t.Errorf("frame of %d octets, type %x", f.Len, b[12:14])
			}
			return true
		})
	})
}

// Several queues are as good as those of a TAP.
func TestTUNQueues(t *testing.T) {
	d := openTest(t, Options{TUN: true, MAC: testMAC, MTU: 1400, ReadOffload: true, Queues: 2})
	if n := len(d.Queues()); n != 2 {
		t.Fatalf("%d queues, want 2", n)
	}
	sh(t, "ip addr add 198.51.100.1/24 dev "+d.Name())
	got := make(chan int, 1)
	for _, q := range d.Queues() {
		go func() {
			fs := frames(4, 64)
			for {
				n, err := q.ReadBatch(fs)
				if err != nil {
					return
				}
				for _, f := range fs[:n] {
					var i packet.Info
					if packet.Decode(f.Buf[f.Off+etherLen:f.Off+f.Len], &i) && i.DstPort == 9 {
						got <- i.Len
					}
				}
			}
		}()
	}
	c, err := net.Dial("udp4", "198.51.100.2:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	select {
	case n := <-got:
		if n != 128 {
			t.Errorf("packet of %d octets, want 128", n)
		}
	case <-time.After(time.Minute):
		t.Error("no packet on either queue")
	}
}

// What a killed instance left is taken over by its like only.
func TestAdoptTUN(t *testing.T) {
	needRoot(t)
	for _, tun := range []bool{false, true} {
		d, err := Open(Options{TUN: tun, For: "mi-phys", Up: true})
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
		if _, err := Open(Options{TUN: !tun, For: "mi-phys"}); !errors.Is(err, ErrNotTAP) {
			t.Errorf("tun %v, then %v: got %v, want ErrNotTAP", tun, !tun, err)
		}
		e, err := Open(Options{TUN: tun, For: "mi-phys"})
		if err != nil {
			t.Fatal(err)
		}
		if e.Name() != d.Name() || e.Super() != d.Super() {
			t.Errorf("adopted %s with %v, want %s with %v", e.Name(), e.Super(), d.Name(), d.Super())
		}
		e.Close()
		if ok, err := Remove("mi-phys"); !ok || err != nil {
			t.Errorf("Remove: got %v, %v", ok, err)
		}
	}
}

// Addresses come usable and without a route, and go.
func TestAddresses(t *testing.T) {
	for _, tun := range []bool{false, true} {
		d := openTest(t, Options{TUN: tun, MAC: testMAC})
		sh(t, "echo 0 >/proc/sys/net/ipv6/conf/"+d.Name()+"/disable_ipv6")
		for _, s := range []string{"198.51.100.7/32", "198.51.100.8/24", "2001:db8::7/64"} {
			p := netip.MustParsePrefix(s)
			for range 2 {
				if err := AddAddress(d.Index(), p); err != nil {
					t.Fatalf("%s: %v", s, err)
				}
			}
			if got := sh(t, "ip -o addr show dev "+d.Name()+" to "+p.Addr().String()); !strings.Contains(got, " "+s+" ") || strings.Contains(got, "tentative") {
				t.Errorf("%s: got %q", s, got)
			}
			if got := sh(t, "(ip route; ip -6 route) | grep -v fe80 | grep dev."+d.Name()+" || true"); got != "" {
				t.Errorf("%s: route %s", s, got)
			}
			if err := DeleteAddress(d.Index(), p); err != nil {
				t.Errorf("%s: %v", s, err)
			}
			if err := DeleteAddress(d.Index(), p); !errors.Is(err, unix.ENOENT) {
				t.Errorf("%s again: %v, want ENOENT", s, err)
			}
		}
	}
}

package wire

import (
	"bytes"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// A tag with identifier 0 hides nothing: the stack takes it off, so chain and
// reader look behind it. Other tags are other interfaces'.
func TestPriorityTags(t *testing.T) {
	l := newLab(t)
	w := openWire(t)
	divert(t, w)
	c := pump(w)
	mac := w.Link().MAC
	var fd int
	var err error
	l.at(func() {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err == nil {
			var i *net.Interface
			if i, err = net.InterfaceByName("e1"); err == nil {
				err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: i.Index})
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	send := func(ip []byte, tags ...byte) {
		t.Helper()
		etype := []byte{0x08, 0x00}
		if ip[0]>>4 == 6 {
			etype = []byte{0x86, 0xdd}
		}
		frame := bytes.Join([][]byte{mac, {2, 0, 0, 0, 0, 9}, tags, etype, ip}, nil)
		if _, err := unix.Write(fd, frame); err != nil {
			t.Fatal(err)
		}
	}
	zero, zeroAD, five := []byte{0x81, 0, 0xa0, 0}, []byte{0x88, 0xa8, 0, 0}, []byte{0x81, 0, 0, 5}
	l4, err := net.ListenPacket("udp4", "10.9.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	defer l4.Close()
	l6, err := net.ListenPacket("udp6", "[fd09::1]:7")
	if err != nil {
		t.Fatal(err)
	}
	defer l6.Close()
	for _, a := range []struct {
		src, dst string
		ear      net.PacketConn
	}{{"10.9.0.2", "10.9.0.1", l4}, {"fd09::2", "fd09::1", l6}} {
		clear := func(text string) []byte { return ipPacket(a.src, a.dst, 17, udpPayload(a.src, a.dst, 500, 7, text)) }
		has := func(text string) func(b []byte) bool {
			return func(b []byte) bool { return bytes.HasSuffix(b, []byte(text)) }
		}
		send(clear("five"), five...)
		send(clear("zero five"), append(zero[:4:4], five...)...)
		send(clear("twice"), append(zero[:4:4], zero...)...)
		send(clear("mixed"), append(zeroAD[:4:4], zero...)...)
		send(clear("once"), zero...)
		send(clear("ad"), zeroAD...)
		send(ipPacket(a.src, a.dst, 50, []byte("12345678 ESP")), zero...)
		for _, want := range []string{"once", "ad", "ESP"} {
			expect(t, c, want, func(b []byte) bool {
				for _, other := range []string{"five", "twice", "mixed"} {
					if has(other)(b) {
						t.Errorf("%q reached the reader", other)
					}
				}
				return has(want)(b)
			})
		}
		if err := w.SetDivert(nil, nil); err != nil {
			t.Fatal(err)
		}
		send(clear("end"))
		buf := make([]byte, 100)
		if n, _, err := a.ear.ReadFrom(buf); err != nil || string(buf[:n]) != "end" {
			t.Errorf("the stack got %q, %v; want only what policy does not concern", buf[:n], err)
		}
		divert(t, w)
	}
}

package ipsecconf

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
)

// link is a message of RTM_GETLINK's answer.
func link(kind uint16, name string, local, remote []byte) []byte {
	b := make([]byte, syscall.SizeofNlMsghdr+syscall.SizeofIfInfomsg)
	binary.NativeEndian.PutUint16(b[4:], syscall.RTM_NEWLINK)
	binary.NativeEndian.PutUint16(b[syscall.SizeofNlMsghdr+2:], kind)
	attr := func(typ uint16, v []byte) {
		b = binary.NativeEndian.AppendUint16(b, uint16(4+len(v)))
		b = binary.NativeEndian.AppendUint16(b, typ)
		b = append(b, v...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	attr(syscall.IFLA_IFNAME, append([]byte(name), 0))
	attr(syscall.IFLA_ADDRESS, local)
	attr(syscall.IFLA_BROADCAST, remote)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

func TestEndsOf(t *testing.T) {
	four := func(n byte) []byte { return []byte{192, 0, 2, n} }
	six := netip.MustParseAddr("2001:db8::1").AsSlice()
	var rib []byte
	for _, l := range [][]byte{
		link(syscall.ARPHRD_ETHER, "eth0", []byte{2, 0, 0, 0, 0, 1}, []byte{255, 255, 255, 255, 255, 255}),
		link(syscall.ARPHRD_ETHER, "odd0", four(1), four(2)),
		link(syscall.ARPHRD_TUNNEL, "tun0", four(1), four(2)),
		link(syscall.ARPHRD_TUNNEL, "tun1", four(1), []byte{0, 0, 0, 0}),
		link(syscall.ARPHRD_TUNNEL6, "tun6", six, six),
		link(syscall.ARPHRD_IPGRE, "gre7", four(1), four(3)),
	} {
		rib = append(rib, l...)
	}
	for name, want := range map[string]string{"tun0": "192.0.2.1 192.0.2.2 [4 41]", "gre7": "192.0.2.1 192.0.2.3 [47]", "tun6": "2001:db8::1 2001:db8::1 [4 41]", "tun1": "", "eth0": "", "odd0": "", "tun": "", "": ""} {
		e, err := endsOf(rib, name)
		if got := fmt.Sprintf("%v %v %v", e.Local, e.Remote, e.Protos); (err == nil) != (want != "") || err == nil && got != want {
			t.Errorf("%q: %s, %v, want %q", name, got, err, want)
		}
	}
	for n := range rib {
		endsOf(rib[:n], "tun0") // must not panic
	}
	if _, err := systemTunnel("lo"); err == nil {
		t.Error("lo is no tunnel")
	}
}

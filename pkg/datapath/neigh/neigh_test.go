package neigh

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	// who has 192.0.2.9? tell 192.0.2.1 (02:01:02:03:04:05)
	arpRequest = `ffffffffffff 020102030405 0806
		0001 0800 06 04 0001 020102030405 c0000201 000000000000 c0000209`
	arpReply = `020102030405 026d69737369 0806
		0001 0800 06 04 0002 026d69737369 c0000209 020102030405 c0000201`
	// fe80::1 solicits 2001:db8::9 (checksum left out: the kernel made it)
	solicitation = `3333ff000009 020102030405 86dd
		60000000 0020 3a ff fe800000000000000000000000000001 ff0200000000000000000001ff000009
		87 00 0000 00000000 20010db8000000000000000000000009 01 01 020102030405`
	advertisement = `020102030405 026d69737369 86dd
		60000000 0020 3a ff 20010db8000000000000000000000009 fe800000000000000000000000000001
		88 00 5f0f 60000000 20010db8000000000000000000000009 02 01 026d69737369`
)

func own(a netip.Addr) bool {
	return a == netip.MustParseAddr("192.0.2.1") || a == netip.MustParseAddr("fe80::1")
}

func TestAnswer(t *testing.T) {
	edit := func(s string, at int, with string) []byte {
		b := unhex(t, s)
		copy(b[at:], unhex(t, with))
		return b
	}
	for _, k := range []struct {
		name  string
		frame []byte
		class Class
		want  []byte
	}{
		{"ARP request", unhex(t, arpRequest), Query, unhex(t, arpReply)},
		{"ARP request, padded", append(unhex(t, arpRequest), make([]byte, 18)...), Query, unhex(t, arpReply)},
		{"ARP for our own address", edit(arpRequest, 38, "c0000201"), Query, nil},
		{"ARP probe (RFC 5227)", edit(arpRequest, 28, "00000000"), Query, nil},
		{"ARP reply", edit(arpRequest, 20, "0002"), Noise, nil},
		{"ARP of another hardware", edit(arpRequest, 14, "0006"), Noise, nil},
		{"NS", unhex(t, solicitation), Query, nil},
		{"NS, DAD", edit(solicitation, 22, strings.Repeat("00", 16)), Noise, nil},
		{"NS for our own address", edit(solicitation, 62, "fe800000000000000000000000000001"), Query, nil},
		{"NS, hop limit 254", edit(solicitation, 21, "fe"), Noise, nil},
		{"NS for a multicast target", edit(solicitation, 62, "ff02"), Noise, nil},
		{"NS, code 1", edit(solicitation, 55, "01"), Noise, nil},
	} {
		if got := Classify(k.frame); got != k.class {
			t.Errorf("%s: got class %v, want %v", k.name, got, k.class)
		}
		out := make([]byte, MaxAnswer)
		n := Answer(k.frame, out, own)
		if k.name == "NS" {
			k.want = unhex(t, advertisement)
			copy(k.want[56:58], out[56:58]) // verified below
			p := append([]byte(nil), out[14:n]...)
			sum := p[42:44]
			if got := checksum(append(append(append([]byte(nil), p[:42]...), 0, 0), p[44:]...)); sum[0] != byte(got>>8) || sum[1] != byte(got) {
				t.Errorf("%s: checksum % x", k.name, sum)
			}
		}
		if !bytes.Equal(out[:n], k.want) {
			t.Errorf("%s:\ngot  % x\nwant % x", k.name, out[:n], k.want)
		}
		for cut := range min(len(k.frame), 42) {
			if n := Answer(k.frame[:cut], out, own); n != 0 {
				t.Errorf("%s cut to %d octets: answered", k.name, cut)
			}
		}
	}
	if n := Answer(unhex(t, arpRequest), make([]byte, MaxAnswer-1), nil); n != 0 {
		t.Error("answered into too little room")
	}
}

func TestClassify(t *testing.T) {
	ip4 := `020102030405 020102030405 0800 4500 0014 0000 0000 40 %s 0000 c0000201 %s`
	v4 := func(proto, dst string) string {
		return strings.Replace(strings.Replace(ip4, "%s", proto, 1), "%s", dst, 1)
	}
	v6 := func(next, hops, dst, payload string) string {
		return `020102030405 020102030405 86dd 60000000 0008 ` + next + hops + ` fe800000000000000000000000000001 ` + dst + payload
	}
	const peer, allNodes, mldv2 = "20010db8000000000000000000000009", "ff020000000000000000000000000001", "ff020000000000000000000000000016"
	for _, k := range []struct {
		name, frame string
		want        Class
	}{
		{"IPv4", v4("11", "c0000209"), Data},
		{"IPv4 multicast, mDNS", v4("11", "e00000fb"), Data},
		{"IGMP", v4("02", "e0000016"), Noise},
		{"IPv4, no version", `020102030405 020102030405 0800` + strings.Repeat("00", 20), Noise},
		{"IPv6", v6("11", "40", peer, "0001000100080000"), Data},
		{"IPv6 mDNS", v6("11", "ff", "ff0200000000000000000000000000fb", "14e914e900080000"), Data},
		{"echo request", v6("3a", "40", peer, "8000000000000000"), Data},
		{"RS", v6("3a", "ff", allNodes, "8500000000000000"), Noise},
		{"RA", v6("3a", "ff", allNodes, "8600000000000000"), Noise},
		{"NA", v6("3a", "ff", allNodes, "8800000000000000"), Noise},
		{"MLDv2 report", v6("00", "01", mldv2, "3a00050200000100 8f00000000000000"), Noise},
		{"hop-by-hop with UDP", v6("00", "40", peer, "1100050200000100 0001000100080000"), Data},
		{"IPv6, cut", `020102030405 020102030405 86dd 6000`, Noise},
		{"LLDP", `0180c200000e 020102030405 88cc 0200`, Noise},
		{"VLAN", `020102030405 020102030405 8100 0001 0800 4500`, Noise},
		{"runt", `0201`, Noise},
		{"empty", ``, Noise},
	} {
		if got := Classify(unhex(t, k.frame)); got != k.want {
			t.Errorf("%s: got %v, want %v", k.name, got, k.want)
		}
	}
}

// MAC is locally administered and unicast.
func TestMAC(t *testing.T) {
	if MAC[0]&3 != 2 {
		t.Errorf("got % x", MAC)
	}
}

func TestNoAllocs(t *testing.T) {
	f, out := unhex(t, solicitation), make([]byte, MaxAnswer)
	if n := testing.AllocsPerRun(100, func() {
		Classify(f)
		Answer(f, out, own)
	}); n != 0 {
		t.Errorf("got %v allocations, want 0", n)
	}
}

func FuzzAnswer(f *testing.F) {
	for _, s := range []string{arpRequest, arpReply, solicitation, advertisement} {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := Classify(b)
		out := make([]byte, MaxAnswer)
		n := Answer(b, out, nil)
		if n != 0 && c != Query {
			t.Fatalf("answered a frame of class %v", c)
		}
		if n != 0 && Classify(out[:n]) != Noise {
			t.Fatal("the answer is a question")
		}
	})
}

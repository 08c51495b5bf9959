package packet

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// syn makes a TCP segment with the flags and options, and a right checksum.
func syn(v6 bool, flags byte, opts []byte, data int) []byte {
	for len(opts)%4 != 0 {
		opts = append(opts, 0)
	}
	t := make([]byte, 20, 20+len(opts)+data)
	binary.BigEndian.PutUint16(t, 1234)
	binary.BigEndian.PutUint16(t[2:], 80)
	t[12], t[13] = byte(5+len(opts)/4)<<4, flags
	t = append(append(t, opts...), make([]byte, data)...)
	b := ip4(6, 0x4000, t)
	h := 20
	if v6 {
		b, h = ip6(6, t), 40
	}
	FixTransportChecksum(b, h, 6)
	return b
}

func TestClampMSS(t *testing.T) {
	mss := func(v int) []byte { return []byte{2, 4, byte(v >> 8), byte(v)} }
	join := func(bs ...[]byte) []byte { return bytes.Join(bs, nil) }
	nop, sack, ts := []byte{1}, []byte{4, 2}, []byte{8, 10, 1, 2, 3, 4, 0, 0, 0, 0}
	for _, tt := range []struct {
		name  string
		flags byte
		opts  []byte
		data  int
		mtu   int
		at    int // of the value in the options
		want4 int // 0: as it was
		want6 int
	}{
		{"lowered", 0x02, mss(1460), 0, 1400, 2, 1360, 1340},
		{"answer", 0x12, join(mss(1460), sack, ts), 0, 1400, 2, 1360, 1340},
		{"behind others", 0x02, join(sack, ts, mss(8960)), 0, 9000 - 73, 14, 8887, 8867},
		{"at an odd place", 0x02, join(nop, mss(1460), sack), 0, 1403, 3, 1363, 1343},
		{"odd, data", 0x02, join(nop, mss(65535), nop), 33, 1280, 3, 1240, 1220},
		{"low enough", 0x02, mss(1340), 0, 1400, 2, 0, 0},
		{"low enough for one", 0x02, mss(1350), 0, 1400, 2, 0, 1340},
		{"no SYN", 0x10, mss(1460), 0, 1400, 2, 0, 0},
		{"no option", 0x02, nil, 4, 1400, 0, 0, 0},
		{"behind the end", 0x02, join([]byte{0, 0, 0, 0}, mss(1460)), 0, 1400, 6, 0, 0},
		{"TCP-AO", 0x02, join(mss(1460), []byte{29, 16}, make([]byte, 14)), 0, 1400, 2, 0, 0},
		{"option too long", 0x02, join(mss(1460), []byte{8, 11}, make([]byte, 6)), 0, 1400, 2, 0, 0},
		{"option of length 0", 0x02, join([]byte{8, 0, 0, 0}, mss(1460)), 0, 1400, 6, 0, 0},
		{"option of length 3", 0x02, []byte{2, 3, 255, 1}, 0, 1400, 2, 0, 0},
		{"no room for anything", 0x02, mss(1460), 0, 40, 2, 0, 0},
	} {
		for _, v6 := range []bool{false, true} {
			b := syn(v6, tt.flags, tt.opts, tt.data)
			before := bytes.Clone(b)
			want, h := tt.want4, 20
			if v6 {
				want, h = tt.want6, 40
			}
			var i Info
			if !Decode(b, &i) {
				t.Fatal("not a packet")
			}
			if got := ClampMSS(b, &i, tt.mtu); got != (want != 0) {
				t.Errorf("%s, IPv6 %v: changed %v", tt.name, v6, got)
			}
			if !verifyUpper(b, h, 6) {
				t.Errorf("%s, IPv6 %v: checksum wrong", tt.name, v6)
			}
			if want != 0 {
				binary.BigEndian.PutUint16(before[h+20+tt.at:], uint16(want))
				FixTransportChecksum(before, h, 6)
			}
			if !bytes.Equal(b, before) {
				t.Errorf("%s, IPv6 %v:\ngot  %x\nwant %x", tt.name, v6, b, before)
			}
		}
	}
	for _, v6 := range []bool{false, true} { // cut anywhere: nothing is written
		b := syn(v6, 2, join(mss(1460), ts), 0)
		for n := range len(b) {
			c := bytes.Clone(b[:n])
			if n >= 40 {
				SetLen(c, n)
			}
			var i Info
			if want := bytes.Clone(c); Decode(c, &i) && (ClampMSS(c, &i, 1400) || !bytes.Equal(c, want)) {
				t.Errorf("IPv6 %v, %d octets: changed", v6, n)
			}
		}
		i := Info{}
		Decode(b, &i)
		i.MF = true
		if ClampMSS(b, &i, 1400) {
			t.Error("a fragment was changed")
		}
	}
}

// FuzzClampMSS: what changes is one word of a SYN, and the checksum with it.
func FuzzClampMSS(f *testing.F) {
	f.Add(syn(false, 2, []byte{1, 2, 4, 5, 180}, 3), 1400)
	f.Add(syn(true, 0x12, []byte{4, 2, 2, 4, 35, 0}, 0), 1280)
	f.Fuzz(func(t *testing.T, b []byte, mtu int) {
		var i Info
		if !Decode(b, &i) {
			return
		}
		before := bytes.Clone(b)
		if !ClampMSS(b, &i, mtu) {
			if !bytes.Equal(b, before) {
				t.Fatal("changed, and denied")
			}
			return
		}
		was, is := upperSum(before, &i), upperSum(b, &i)
		if was != is && (was^is) != 0xffff { // 0 and 0xffff are the same
			t.Fatalf("the sum was %#x and is %#x", was, is)
		}
		if ClampMSS(b, &i, mtu) {
			t.Fatal("twice")
		}
	})
}

func upperSum(b []byte, i *Info) uint16 {
	return Fold(Sum(b[i.HdrLen:i.Len], PseudoSum(b, i.Proto, i.Len-i.HdrLen)))
}

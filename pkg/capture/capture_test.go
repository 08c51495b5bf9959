package capture

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/datapath/packet"
)

var (
	wired  = Interface{Name: "eth0", Link: LinkIP}
	tapped = Interface{Name: "tap0", Link: LinkEthernet}
	moment = time.Unix(1_700_000_000, 123_456_789)
)

// ipPacket is an IPv4 packet of protocol proto around payload.
func ipPacket(proto uint8, payload []byte) []byte {
	b := make([]byte, packet.IPv4Len+len(payload))
	packet.PutHeader(b, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), proto, len(b), 64)
	copy(b[packet.IPv4Len:], payload)
	packet.FixIPv4Checksum(b)
	return b
}

var (
	echo  = ipPacket(1, []byte{8, 0, 0, 0, 0, 1, 0, 2, 'x'})
	esp1  = ipPacket(50, []byte{0, 0, 0x10, 0, 0, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8})
	frame = append([]byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0}, echo...)
)

func frames() []Frame {
	return []Frame{
		{Side: High, Dir: Out, Time: moment, Len: len(frame), Data: frame},
		{Side: Low, Dir: Out, Time: moment.Add(1), Len: len(esp1), Data: esp1},
		{Side: Low, Dir: In, Time: moment.Add(2), Len: 2000, Data: esp1, Comment: "drop_in_replay", Lost: 3},
		{Side: High, Dir: In, Time: moment.Add(3), Len: len(frame), Data: frame[:len(frame)-1]},
	}
}

func ifaces(s Side) Interface { return [2]Interface{wired, tapped}[s] }

// TestFile: tshark and capinfos read out of the file what was put in.
func TestFile(t *testing.T) {
	if _, err := exec.LookPath("tshark"); err != nil {
		t.Skip("no tshark; scripts/setup installs it")
	}
	path := filepath.Join(t.TempDir(), "x.pcapng")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := NewWriter(f, "missiu test", Both, ifaces)
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range frames() {
		if err := w.Write(&one); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(Both); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tshark", "-n", "-r", path, "-T", "json",
		"-e", "frame.time_epoch", "-e", "frame.interface_name", "-e", "frame.interface_description", "-e", "frame.packet_flags_direction",
		"-e", "frame.comment", "-e", "frame.len", "-e", "frame.cap_len", "-e", "esp.spi", "-e", "icmp.seq").Output()
	if err != nil {
		t.Fatalf("%v %s", err, out)
	}
	var got []struct {
		Source struct {
			Layers map[string][]string `json:"layers"`
		} `json:"_source"`
	}
	if err := json.Unmarshal(out, &got); err != nil || len(got) != 4 {
		t.Fatalf("%v: %s", err, out)
	}
	for k, want := range []map[string]string{
		{"frame.time_epoch": "1700000000.123456789", "frame.interface_name": "tap0", "frame.interface_description": "high", "frame.packet_flags_direction": "0x00000002", "icmp.seq": "2", "frame.len": "43", "frame.comment": ""},
		{"frame.time_epoch": "1700000000.123456790", "frame.interface_name": "eth0", "frame.interface_description": "low", "frame.packet_flags_direction": "0x00000002", "esp.spi": "0x00001000"},
		{"frame.packet_flags_direction": "0x00000001", "frame.comment": "drop_in_replay", "frame.len": "2000", "frame.cap_len": "36"},
		{"frame.packet_flags_direction": "0x00000001", "frame.len": "43", "frame.cap_len": "42"},
	} {
		for field, v := range want {
			if g := strings.Join(got[k].Source.Layers[field], ","); g != v {
				t.Errorf("frame %d: %s is %q, want %q", k, field, g, v)
			}
		}
	}
	info, err := exec.Command("capinfos", path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v %s", err, info)
	}
	for _, want := range []string{"pcapng", "nanoseconds (9)", "Number of packets:   4", "Name = eth0", "Name = tap0", "Raw IP", "Number of stat entries = 1", "missiu test"} {
		if !bytes.Contains(info, []byte(want)) {
			t.Errorf("capinfos does not say %q:\n%s", want, info)
		}
	}
}

// TestFileOctets: the octets of a block by the draft: an enhanced packet block
// with flags, dropcount and comment.
func TestFileOctets(t *testing.T) {
	var b bytes.Buffer
	w, err := NewWriter(&b, "m", OnlyLow, ifaces)
	if err != nil {
		t.Fatal(err)
	}
	b.Reset()
	if err := w.Write(&Frame{Side: Low, Dir: In, Time: time.Unix(0, 1<<32+5), Len: 9, Lost: 2, Comment: "abcde", Data: []byte{1, 2, 3}}); err != nil {
		t.Fatal(err)
	}
	want := "06000000" + "48000000" + "00000000" + "01000000" + "05000000" + "03000000" + "09000000" + "01020300" +
		"0200" + "0400" + "01000000" + "0400" + "0800" + "0200000000000000" + "0100" + "0500" + "6162636465000000" + "00000000" + "48000000"
	if got := fmt.Sprintf("%x", b.Bytes()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestLine(t *testing.T) {
	at := moment.Format("15:04:05.000000000")
	udp := func(sport, dport byte, p ...byte) []byte {
		return ipPacket(17, append([]byte{17, sport, 17, dport, 0, byte(8 + len(p)), 0, 0}, p...))
	}
	v6 := make([]byte, 48)
	packet.PutHeader(v6, netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), 58, 48, 64)
	v6[40] = 129
	frag := bytes.Clone(ipPacket(50, make([]byte, 24)))
	frag[6] = 0x20
	marker := make([]byte, 4+28)
	marker[4+17], marker[4+18], marker[4+23] = 0x20, 34, 5
	tcp := make([]byte, 20)
	tcp[1], tcp[3], tcp[12], tcp[13] = 80, 81, 0x50, 0x12
	arp := append([]byte{255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2, 192, 0, 2, 1}, 0, 0, 0, 0, 0, 0, 192, 0, 2, 2)
	reply := bytes.Clone(arp)
	reply[21] = 2
	vlan := append(append(bytes.Clone(frame[:12]), 0x81, 0, 0, 42), frame[12:]...)
	for _, tt := range []struct {
		link uint16
		data []byte
		want string
	}{
		{LinkEthernet, frame, "IP 192.0.2.1 > 192.0.2.2: ICMP echo request, id 1, seq 2, length 9"},
		{LinkEthernet, vlan, "vlan 42, IP 192.0.2.1 > 192.0.2.2: ICMP echo request, id 1, seq 2, length 9"},
		{LinkEthernet, arp, "ARP who-has 192.0.2.2 tell 192.0.2.1"},
		{LinkEthernet, reply, "ARP reply 192.0.2.1 is-at 02:00:00:00:00:02"},
		{LinkEthernet, append(bytes.Clone(frame[:12]), 0x88, 0xcc, 1, 2), "02:00:00:00:00:02 > 02:00:00:00:00:01, ethertype 0x88cc, length 2"},
		{LinkEthernet, frame[:13], "short frame, length 13"},
		{LinkIP, esp1, "IP 192.0.2.1 > 192.0.2.2: ESP(spi=0x00001000,seq=0x7), length 16"},
		{LinkIP, esp1[:20], "malformed IP, length 20"},
		{LinkIP, frag, "IP 192.0.2.1 > 192.0.2.2: frag 0:24@0+, ESP(spi=0x00000000,seq=0x0), length 24"},
		{LinkIP, v6, "IP6 2001:db8::1 > 2001:db8::2: ICMP6 echo reply, id 0, seq 0, length 8"},
		{LinkIP, udp(0x94, 0x94, 0, 0, 1, 2, 0, 0, 0, 3), "IP 192.0.2.1.4500 > 192.0.2.2.4500: UDP ESP(spi=0x00000102,seq=0x3), length 16"},
		{LinkIP, udp(0x94, 0x94, 255), "IP 192.0.2.1.4500 > 192.0.2.2.4500: UDP NAT keepalive, length 9"},
		{LinkIP, udp(0x94, 0x94, marker...), "IP 192.0.2.1.4500 > 192.0.2.2.4500: UDP IKEv2 exchange 34, id 5, length 40"},
		{LinkIP, udp(1, 2), "IP 192.0.2.1.4353 > 192.0.2.2.4354: UDP, length 8"},
		{LinkIP, ipPacket(6, tcp), "IP 192.0.2.1.80 > 192.0.2.2.81: Flags [S.], seq 0, ack 0, length 20"},
		{LinkIP, ipPacket(51, make([]byte, 12)), "IP 192.0.2.1 > 192.0.2.2: AH(spi=0x00000000,seq=0x0), length 12"},
		{LinkIP, ipPacket(4, echo), "IP 192.0.2.1 > 192.0.2.2: IP 192.0.2.1 > 192.0.2.2: ICMP echo request, id 1, seq 2, length 9, length 29"},
		{LinkIP, ipPacket(99, nil), "IP 192.0.2.1 > 192.0.2.2: protocol 99, length 0"},
	} {
		f := Frame{Side: Low, Dir: In, Time: moment, Data: tt.data, Comment: "drop_in_auth"}
		if got, want := f.Line(tt.link), at+" low  In  "+tt.want+" [drop_in_auth]"; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// hub serves in a directory of the test.
func hub(t *testing.T) (*Hub, string) {
	t.Helper()
	h := NewHub(wired, tapped)
	path := filepath.Join(t.TempDir(), "eth0.monitor")
	if err := h.Listen(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h, path
}

func dial(t *testing.T, h *Hub, path string, sides Sides) *Reader {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	before := h.readers.Load()
	r, err := Dial(ctx, path, sides)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	wait(t, "reader counted", func() bool { return h.readers.Load() > before })
	return r
}

func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in a minute: %s", what)
		}
	}
}

// TestHub: each reader gets the frames of the sides that it asked for, whole
// and in order, and nothing when nobody is there.
func TestHub(t *testing.T) {
	h, path := hub(t)
	if h.Active() || (*Hub)(nil).Active() {
		t.Fatal("active without readers")
	}
	h.Publish(frames())
	(*Hub)(nil).Publish(frames())
	told := make(chan bool, 9)
	h.Notify(func(active bool) { told <- active })
	both := dial(t, h, path, Both)
	high := dial(t, h, path, OnlyHigh)
	if both.Interface(Low) != wired || both.Interface(High) != tapped || high.Interface(High) != tapped || high.Interface(Low) != (Interface{}) {
		t.Error("interfaces described wrongly")
	}
	h.Publish(frames())
	for _, r := range []*Reader{both, high} {
		for k, want := range frames() {
			if !r.Sides().Has(want.Side) {
				continue
			}
			want.Lost = 0
			got, err := r.Read()
			if err != nil || !got.Time.Equal(want.Time) {
				t.Fatalf("frame %d: %+v, %v", k, got, err)
			}
			got.Time = want.Time
			if !reflect.DeepEqual(got, want) {
				t.Errorf("frame %d:\ngot  %+v\nwant %+v", k, got, want)
			}
		}
	}
	high.Close()
	wait(t, "reader gone", func() bool { return h.readers.Load() == 1 })
	h.Close()
	if _, err := both.Read(); !errors.Is(err, io.EOF) {
		t.Errorf("after Close: %v", err)
	}
	if h.Active() {
		t.Error("active after Close")
	}
	if first, last := <-told, <-told; !first || last || len(told) != 0 {
		t.Errorf("told of the first reader %v, of the last %v, and %d times more", first, !last, len(told))
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("socket after Close: %v", err)
	}
}

// TestSlowReader: one that does not read holds up nobody, and learns exactly how
// many frames it lost.
func TestSlowReader(t *testing.T) {
	h, path := hub(t)
	slow := dial(t, h, path, Both)
	big := Frame{Side: Low, Dir: In, Time: moment, Len: 60000, Data: make([]byte, 60000)}
	const sent = 2000 // 120 MB
	for range sent {
		h.Publish([]Frame{big})
	}
	got, lost := 0, 0
	read := func() bool {
		f, err := slow.Read()
		if err != nil {
			t.Fatal(err)
		}
		got++
		lost += int(f.Lost)
		return f.Side == High
	}
	// What is queued has no gap; the first after it tells.
	for end := time.Now().Add(time.Minute); lost == 0; {
		if time.Now().After(end) {
			t.Fatal("not told of losses")
		}
		h.Publish([]Frame{big})
		read()
	}
	extra := got // as many were published meanwhile
	h.Publish([]Frame{{Side: High, Dir: In, Time: moment}})
	for !read() {
	}
	// Frames published while the queue was full again may be lost beyond the last that told.
	if total := sent + extra + 1; got+lost > total || got+lost < total-extra || lost == 0 || got > queueOctets/60000+extra+100 {
		t.Errorf("%d read, %d lost, of %d", got, lost, total)
	}
}

// TestRequests: who does not speak the protocol is sent away.
func TestRequests(t *testing.T) {
	_, path := hub(t)
	for _, req := range [][]byte{{2, 3, 0, 0}, {1, 0, 0, 0}, {1, 4, 0, 0}, {1, 3, 1, 0}, {1, 3, 0}, {1, 3, 0, 0, 0}} {
		c, err := attach.Dial(path)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(time.Minute))
		c.Write(req)
		if n, err := c.Read(make([]byte, 100)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("request %x: %d octets, %v", req, n, err)
		}
		c.Close()
	}
}

// TestTape: nothing is kept while nobody looks; otherwise all of it, in order,
// with the reason at the first.
func TestTape(t *testing.T) {
	h, path := hub(t)
	tape := Tape{Hub: h}
	if n := testing.AllocsPerRun(10, func() {
		if tape.Start() || tape.On() {
			t.Fatal("records for nobody")
		}
		tape.Record(High, Out, nil, frame, "")
		tape.Explain("x")
		tape.Publish()
	}); n != 0 {
		t.Errorf("%v allocations for nobody", n)
	}
	r := dial(t, h, path, Both)
	if !tape.Start() {
		t.Fatal("does not record")
	}
	tape.Record(High, Out, frame[:14], frame[14:], "")
	tape.Record(Low, Out, nil, esp1, "")
	tape.Explain("drop_out_send")
	tape.Publish()
	tape.Publish()
	a, err1 := r.Read()
	data := bytes.Clone(a.Data)
	b, err2 := r.Read()
	if err := errors.Join(err1, err2); err != nil || a.Comment != "drop_out_send" || !bytes.Equal(data, frame) || b.Comment != "" || !bytes.Equal(b.Data, esp1) {
		t.Errorf("%+v, %+v, %v", a, b, err)
	}
}

// FuzzMessage: nothing that comes over the socket makes the reader panic, and
// what parses is written again as it was.
func FuzzMessage(f *testing.F) {
	f.Add(appendInterface(nil, Low, &wired))
	f.Add(appendInterface(nil, High, &tapped))
	for _, one := range frames() {
		f.Add(one.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parse(b)
		if err != nil {
			if e := (*FormatError)(nil); !errors.As(err, &e) {
				t.Fatalf("%T", err)
			}
			return
		}
		var again []byte
		if m.iface != nil {
			again = appendInterface(nil, m.side, m.iface)
		} else {
			m.frame.Line(LinkEthernet)
			m.frame.Line(LinkIP)
			again = m.frame.append(nil)
		}
		if !bytes.Equal(again, b) {
			t.Fatalf("got  %x\nwant %x", again, b)
		}
	})
}

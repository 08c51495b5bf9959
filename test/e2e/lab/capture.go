package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/gopacket/pcapgo"
)

// Kind says what a packet on the wire is to somebody who must not read it.
type Kind int

// Kinds.
const (
	Clear     Kind = iota // an IP packet that anybody can read
	ESP                   // IP protocol 50
	ESPinUDP              // RFC 3948
	AH                    // IP protocol 51; can be read by anybody too
	IKE                   // UDP 500, or 4500 behind the non-ESP marker
	Keepalive             // one octet 0xff on UDP 4500
	Neighbour             // ARP and neighbour discovery
	Multicast             // other packets to a group: MLD and the like
	NotIP
)

var kindNames = [...]string{"clear", "ESP", "ESP in UDP", "AH", "IKE", "keepalive", "neighbour", "multicast", "not IP"}

func (k Kind) String() string { return kindNames[k] }

// Packet is a captured frame.
type Packet struct {
	Time     time.Time
	Kind     Kind
	Src, Dst netip.Addr
	Proto    uint8  // IP protocol behind IPv6 extension headers
	SPI, Seq uint32 // of ESP, AH
	Fragment bool
	Frame    []byte // may be cut by the capture's snap length
	L4       int    // where the upper header begins in Frame
	Len      int    // on the wire
}

func (p Packet) String() string {
	s := fmt.Sprintf("%v %v > %v proto %d length %d", p.Kind, p.Src, p.Dst, p.Proto, p.Len)
	if p.SPI != 0 {
		s += fmt.Sprintf(" SPI 0x%08x seq %d", p.SPI, p.Seq)
	}
	if p.Fragment {
		s += " fragment"
	}
	return s
}

// Capture is a running tcpdump.
type Capture struct {
	h    *Host
	p    *Proc
	Path string

	filtered bool
}

var captures atomic.Int64

// Capture starts to record an interface of the host, packets cut to 256
// octets. It does not make the interface promiscuous, which would be seen in
// its flags.
func (h *Host) Capture(ifname string, filter ...string) *Capture {
	h.t.Helper()
	return h.capture(ifname, 256, filter)
}

// CaptureWhole is Capture with packets uncut, for decryption and for sending again.
func (h *Host) CaptureWhole(ifname string, filter ...string) *Capture {
	h.t.Helper()
	return h.capture(ifname, 262144, filter)
}

func (h *Host) capture(ifname string, snap int, filter []string) *Capture {
	h.t.Helper()
	path := filepath.Join(h.Dir, fmt.Sprintf("%s-%d.pcap", ifname, captures.Add(1)))
	args := []string{"tcpdump", "-p", "-n", "-U", "-Z", "root", "-B", "131072", "-s", strconv.Itoa(snap), "-i", ifname, "-w", path}
	c := &Capture{h: h, Path: path, p: h.Start(append(args, filter...)...), filtered: len(filter) > 0}
	c.p.Says("listening on", 20*time.Second)
	return c
}

var tcpdumpStats = regexp.MustCompile(`(\d+) packets? captured, (\d+) packets? received by filter, (\d+) packets? dropped`)

// sync waits until tcpdump has written every packet that the kernel has given
// it, so that what happened before is in the file.
func (c *Capture) sync() {
	c.h.t.Helper()
	// Each SIGUSR1 has tcpdump tell its counters once.
	asked := 0
	var counts string
	var rests time.Time
	Until(c.h.t, 20*time.Second, "tcpdump to catch up", func() (bool, string) {
		told := tcpdumpStats.FindAllStringSubmatch(c.p.Output(), -1)
		if len(told) < asked {
			return false, c.p.Output()
		}
		if asked > 0 {
			last := told[len(told)-1]
			if last[1] == last[2] {
				return true, ""
			}
			// What tcpdump filters itself, as it does directions, it never
			// writes. It has a packet from the kernel within a second.
			if last[0] != counts {
				counts, rests = last[0], time.Now()
			} else if c.filtered && time.Since(rests) > 3*time.Second {
				return true, ""
			}
		}
		asked = len(told) + 1
		c.p.Signal(syscall.SIGUSR1)
		return false, c.p.Output()
	})
}

// Packets returns what was seen so far.
func (c *Capture) Packets() []Packet {
	c.h.t.Helper()
	c.sync()
	return ReadPcap(c.h.t, c.Path)
}

// Stop ends the capture and returns its packets. A capture that lost packets
// proves nothing, so that fails the test.
func (c *Capture) Stop() []Packet {
	c.h.t.Helper()
	c.sync()
	c.p.Stop()
	m := regexp.MustCompile(`(\d+) packets? dropped by kernel`).FindAllStringSubmatch(c.p.Output(), -1)
	if len(m) == 0 || m[len(m)-1][1] != "0" {
		c.h.t.Fatalf("capture lost packets:\n%s", c.p.Output())
	}
	return ReadPcap(c.h.t, c.Path)
}

// ReadPcap reads a file of tcpdump. A last record that is not complete yet is left out.
func ReadPcap(t TB, path string) []Packet {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer f.Close()
	r, err := pcapgo.NewReader(f)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	var ps []Packet
	frags := map[fragKey]Packet{}
	for {
		b, ci, err := r.ReadPacketData()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return ps
		}
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		p := classify(b, frags)
		p.Time, p.Len = ci.Timestamp, ci.Length
		ps = append(ps, p)
	}
}

// Count tells how many packets of each kind there are.
func Count(ps []Packet) map[Kind]int {
	m := map[Kind]int{}
	for _, p := range ps {
		m[p.Kind]++
	}
	return m
}

// Of returns the packets of some kinds.
func Of(ps []Packet, kinds ...Kind) []Packet {
	var out []Packet
	for _, p := range ps {
		for _, k := range kinds {
			if p.Kind == k {
				out = append(out, p)
			}
		}
	}
	return out
}

// NoClear fails the test if any packet could be read on the wire.
func NoClear(t TB, ps []Packet) {
	t.Helper()
	clear := Of(ps, Clear)
	for i, p := range clear {
		if i == 5 {
			break
		}
		t.Errorf("in clear: %v", p)
	}
	if len(clear) > 0 {
		t.Errorf("%d packets in clear, want 0", len(clear))
	}
}

type fragKey struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8
}

// classify looks at an Ethernet frame. frags remembers what the first
// fragments were, so that the later ones of a datagram count as the same.
func classify(b []byte, frags map[fragKey]Packet) Packet {
	p := Packet{Kind: NotIP, Frame: b}
	if len(b) < 14 {
		return p
	}
	off := 12
	for len(b) >= off+6 && binary.BigEndian.Uint16(b[off:]) == 0x8100 {
		off += 4
	}
	etype := binary.BigEndian.Uint16(b[off:])
	off += 2
	var id uint32
	first, more := true, false
	switch {
	case etype == 0x0806:
		p.Kind = Neighbour
		return p
	case etype == 0x0800 && len(b) >= off+20:
		ip := b[off:]
		p.Src, p.Dst = addr(ip[12:16]), addr(ip[16:20])
		p.Proto = ip[9]
		fo := binary.BigEndian.Uint16(ip[6:])
		first, more = fo&0x1fff == 0, fo&0x2000 != 0
		id = uint32(binary.BigEndian.Uint16(ip[4:]))
		off += int(ip[0]&15) * 4
	case etype == 0x86dd && len(b) >= off+40:
		ip := b[off:]
		p.Src, p.Dst = addr(ip[8:24]), addr(ip[24:40])
		p.Proto = ip[6]
		off += 40
	walk:
		for len(b) >= off+8 {
			switch p.Proto {
			case 0, 43, 60: // hop-by-hop, routing, destination options
				p.Proto = b[off]
				off += 8 + 8*int(b[off+1])
			case 44:
				fo := binary.BigEndian.Uint16(b[off+2:])
				first, more = fo>>3 == 0, fo&1 != 0
				id = binary.BigEndian.Uint32(b[off+4:])
				p.Proto = b[off]
				off += 8
				if !first {
					break walk
				}
			default:
				break walk
			}
		}
	default:
		return p
	}
	p.Fragment = !first || more
	p.L4 = off
	key := fragKey{p.Src, p.Dst, id, p.Proto}
	if !first {
		f, ok := frags[key]
		p.Kind = Clear
		if ok {
			p.Kind, p.SPI, p.Seq = f.Kind, f.SPI, f.Seq
		}
		return p
	}
	p.upper()
	if more {
		frags[key] = p
	}
	return p
}

// upper tells the kind by the upper protocol, which begins at L4.
func (p *Packet) upper() {
	p.Kind = Clear
	if p.Dst.IsMulticast() || p.Dst == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		p.Kind = Multicast
	}
	b := p.Frame[min(p.L4, len(p.Frame)):]
	switch {
	case p.Proto == 50 && len(b) >= 8:
		p.Kind = ESP
		p.SPI, p.Seq = binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
	case p.Proto == 51 && len(b) >= 12:
		p.Kind = AH
		p.SPI, p.Seq = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
	case p.Proto == 58 && len(b) >= 1 && b[0] >= 133 && b[0] <= 137:
		p.Kind = Neighbour
	case p.Proto == 17 && len(b) >= 8:
		sp, dp := binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		u := b[8:]
		switch {
		case sp == 500 || dp == 500:
			p.Kind = IKE
		case sp != 4500 && dp != 4500:
		case len(u) == 1 && u[0] == 0xff:
			p.Kind = Keepalive
		case len(u) >= 8 && binary.BigEndian.Uint32(u) != 0:
			p.Kind = ESPinUDP
			p.SPI, p.Seq = binary.BigEndian.Uint32(u), binary.BigEndian.Uint32(u[4:])
		case len(u) >= 32:
			p.Kind = IKE
		}
	}
}

func addr(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Key is an ESP SA in Wireshark's words.
type Key struct {
	Src, Dst netip.Addr
	SPI      uint32
	Encr     string // "AES-CBC [RFC3602]"
	EncrKey  []byte // with the salt of an AEAD
	Auth     string // "HMAC-SHA-1-96 [RFC2404]"; "NULL" with an AEAD
	AuthKey  []byte
}

// Wireshark's names of algorithms.
const (
	Wireshark3DESCBC  = "TripleDES-CBC [RFC2451]"
	WiresharkAESCBC   = "AES-CBC [RFC3602]"
	WiresharkAESGCM8  = "AES-GCM with 8 octet ICV [RFC4106]"
	WiresharkAESGCM12 = "AES-GCM with 12 octet ICV [RFC4106]"
	WiresharkAESGCM16 = "AES-GCM with 16 octet ICV [RFC4106]"
	WiresharkNULL     = "NULL"
	WiresharkSHA1     = "HMAC-SHA-1-96 [RFC2404]"
	WiresharkSHA256   = "HMAC-SHA-256-128 [RFC4868]"
	WiresharkSHA384   = "HMAC-SHA-384-192 [RFC4868]"
	WiresharkSHA512   = "HMAC-SHA-512-256 [RFC4868]"
)

// Decrypt has tshark decrypt a capture and returns, for each packet that the
// display filter picks, the values of the fields; several values of one field
// (outer and inner) are joined by commas, outer first.
func Decrypt(t TB, pcap string, keys []Key, display string, fields ...string) [][]string {
	t.Helper()
	args := []string{
		"tshark", "-n", "-r", pcap, "-Y", display, "-T", "fields", "-E", "separator=/t",
		"-o", "esp.enable_encryption_decode:TRUE",
		"-o", "esp.enable_authentication_check:TRUE",
		"-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE",
	}
	for _, k := range keys {
		family := "IPv4"
		if k.Src.Is6() {
			family = "IPv6"
		}
		args = append(args, "-o", fmt.Sprintf(`uat:esp_sa:"%s","%v","%v","0x%08x","%s","%s","%s","%s"`,
			family, k.Src, k.Dst, k.SPI, k.Encr, hexKey(k.EncrKey), k.Auth, hexKey(k.AuthKey)))
	}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	// Without a home of its own tshark would read and write the user's preferences.
	args = append([]string{"env", "HOME=" + t.TempDir(), "XDG_CONFIG_HOME="}, args...)
	out := must(t, args...)
	var rows [][]string
	for _, line := range strings.Split(strings.TrimRight(out, "\n"), "\n") {
		if line != "" {
			rows = append(rows, strings.Split(line, "\t"))
		}
	}
	return rows
}

func hexKey(k []byte) string {
	if len(k) == 0 {
		return ""
	}
	return fmt.Sprintf("0x%x", k)
}

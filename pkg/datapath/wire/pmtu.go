package wire

import (
	"encoding/binary"
	"net/netip"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
)

const (
	// pathMTUAge: RFC 1191, 6.3; RFC 8201, 4.
	pathMTUAge = 10 * time.Minute
	// kernelAge is how long the kernel's answer counts.
	kernelAge = time.Minute

	minIPv4MTU = 576  // RFC 1122, 3.3.3; 68 is legal, but only attackers use it
	minIPv6MTU = 1280 // RFC 8200, 5

	maxPaths = 16384
)

// pmtu is what is known about paths.
type pmtu struct {
	mu    sync.RWMutex
	paths map[netip.Addr]path
	judge atomic.Pointer[func(TooBig) bool]

	believed, odd atomic.Uint64
}

// path: an MTU of 0 is unknown.
type path struct {
	kernel      int
	kernelUntil time.Time
	learnt      int
	learntUntil time.Time
}

func (p *pmtu) get(dst netip.Addr) path {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.paths[dst]
}

// edit changes what is known about one path. When the table is full all is
// forgotten: the kernel can be asked again, and a router will complain again.
func (p *pmtu) edit(dst netip.Addr, f func(*path)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, ok := p.paths[dst]
	if p.paths == nil || !ok && len(p.paths) >= maxPaths {
		p.paths = map[netip.Addr]path{}
	}
	f(&v)
	p.paths[dst] = v
}

// doubt has the kernel asked about a path again, as it has refused a packet; at
// most once a second.
func (p *pmtu) doubt(dst netip.Addr, now time.Time) {
	if now.Add(kernelAge - time.Second).Before(p.get(dst).kernelUntil) {
		return
	}
	p.edit(dst, func(q *path) { q.kernelUntil = time.Time{} })
}

func (p *pmtu) forgetKernel() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for a, v := range p.paths {
		v.kernelUntil = time.Time{}
		p.paths[a] = v
	}
}

// PathMTU returns the length of the largest IP packet, in octets, that reaches
// dst as far as is known. The first question about a destination, and one a
// minute, costs a system call. With Options.Mark routes are not asked: they
// have heard from us what fits the path to a peer before it is protected.
func (w *Wire) PathMTU(dst netip.Addr) int { return w.pathMTU(dst, time.Now()) }

func (w *Wire) pathMTU(dst netip.Addr, now time.Time) int {
	p := w.pmtu.get(dst)
	if now.After(p.kernelUntil) {
		k := w.kernelMTU(dst)
		w.pmtu.edit(dst, func(q *path) {
			q.kernel, q.kernelUntil = k, now.Add(kernelAge)
			p = *q
		})
	}
	mtu := w.link.Load().MTU
	if p.kernel > 0 {
		mtu = min(mtu, p.kernel)
	}
	if p.learnt > 0 && now.Before(p.learntUntil) {
		mtu = min(mtu, p.learnt)
	}
	return mtu
}

// kernelMTU asks the route to dst over the interface for its MTU: from a route
// of the administrator or from the kernel's own path MTU discovery. 0: none.
func (w *Wire) kernelMTU(dst netip.Addr) int {
	mtu := 0
	if w.options.Mark == 0 {
		rs, err := w.handle.RouteGetWithOptions(dst.AsSlice(), &netlink.RouteGetOptions{OifIndex: w.index})
		if err == nil && len(rs) > 0 && rs[0].LinkIndex == w.index {
			mtu = rs[0].MTU
		}
	}
	if dst.Is6() { // a router may have announced less than the link's (RFC 4861, 4.6.4)
		s, err := readSysctl(filepath.Join("/proc/sys/net/ipv6/conf", w.name, "mtu"))
		if n, err2 := strconv.Atoi(s); err == nil && err2 == nil && (mtu == 0 || n < mtu) {
			mtu = n
		}
	}
	return mtu
}

// SetPathMTU notes a path MTU that was learnt; it is forgotten after ten
// minutes. Values below 576 (IPv4) or 1280 (IPv6) are raised to that: smaller
// ones are legal, but only attackers use them.
func (w *Wire) SetPathMTU(dst netip.Addr, mtu int) { w.setPathMTU(dst, mtu, time.Now()) }

func (w *Wire) setPathMTU(dst netip.Addr, mtu int, now time.Time) {
	if dst.Is6() {
		mtu = max(mtu, minIPv6MTU)
	} else {
		mtu = max(mtu, minIPv4MTU)
	}
	w.pmtu.edit(dst, func(p *path) { p.learnt, p.learntUntil = mtu, now.Add(pathMTUAge) })
}

// VerifyTooBig sets the judge of ICMP errors that quote our ESP, AH or UDP
// 4500: only if it returns true is the path MTU lowered (RFC 4301, 8.2.1). nil:
// all are believed that quote an address of this host as source. It is called
// from ReadBatch and must not block.
func (w *Wire) VerifyTooBig(judge func(TooBig) bool) {
	if judge == nil {
		w.pmtu.judge.Store(nil)
		return
	}
	w.pmtu.judge.Store(&judge)
}

// Heard looks for an ICMP error about the path in an IP packet that passed by. With
// Options.Mark it is the caller's to tell of all of them.
func (w *Wire) Heard(b []byte) {
	if isTooBig(b) {
		w.heard(b)
	}
}

// heard takes an ICMP error that passed by, whoever's packet it is.
func (w *Wire) heard(b []byte) {
	t, ok := ParseTooBig(b)
	if !ok {
		return // about other traffic
	}
	now := time.Now()
	judge := w.pmtu.judge.Load()
	if !w.IsLocal(t.Src) || judge != nil && !(*judge)(t) || t.MTU >= w.pathMTU(t.Dst, now) {
		w.pmtu.odd.Add(1)
		return
	}
	w.pmtu.believed.Add(1)
	w.setPathMTU(t.Dst, t.MTU, now)
}

// TooBig is what an ICMP "fragmentation needed" or ICMPv6 "packet too big"
// says about a packet of ours that it quotes.
type TooBig struct {
	MTU      int
	Src, Dst netip.Addr // of the quoted packet
	Proto    uint8      // 50, 51 or 17
	SPI      uint32     // of ESP, AH, or ESP in UDP; 0 if IKE or not quoted
	SrcPort  uint16     // UDP
	DstPort  uint16
}

// isTooBig is the cheap test before ParseTooBig.
func isTooBig(b []byte) bool {
	switch {
	case len(b) >= 28 && b[0]>>4 == 4 && b[9] == protoICMP:
		h := int(b[0]&15) * 4
		return h >= 20 && len(b) > h+1 && b[h] == 3 && b[h+1] == 4
	case len(b) >= 88 && b[0]>>4 == 6 && b[6] == protoICMPv6:
		return b[40] == 2
	}
	return false
}

// ParseTooBig reads an IP packet that holds an ICMP error of type 3, code 4
// (RFC 792, RFC 1191) or an ICMPv6 error of type 2 (RFC 4443, 3.2) about ESP,
// AH or UDP from or to port 4500. false: it is something else, or malformed,
// or its checksum is wrong.
func ParseTooBig(b []byte) (TooBig, bool) {
	var t TooBig
	if !isTooBig(b) {
		return t, false
	}
	if b[0]>>4 == 4 {
		return parseTooBig4(b)
	}
	return parseTooBig6(b)
}

func parseTooBig4(b []byte) (t TooBig, ok bool) {
	n := int(binary.BigEndian.Uint16(b[2:]))
	h := int(b[0]&15) * 4
	if n > len(b) || n < h+8+20 || binary.BigEndian.Uint16(b[6:])&0x3fff != 0 {
		return t, false
	}
	icmp := b[h:n]
	if sum16(0, icmp) != 0xffff {
		return t, false
	}
	q := icmp[8:]
	qh := int(q[0]&15) * 4
	if q[0]>>4 != 4 || qh < 20 || len(q) < qh+8 || binary.BigEndian.Uint16(q[6:])&0x1fff != 0 {
		return t, false
	}
	t.MTU = int(binary.BigEndian.Uint16(icmp[6:]))
	t.Src, t.Dst = netip.AddrFrom4([4]byte(q[12:16])), netip.AddrFrom4([4]byte(q[16:20]))
	total := int(binary.BigEndian.Uint16(q[2:]))
	if t.MTU == 0 {
		t.MTU = plateau(total)
	}
	return t, t.MTU < total && t.upper(q[9], q[qh:])
}

func parseTooBig6(b []byte) (t TooBig, ok bool) {
	n := 40 + int(binary.BigEndian.Uint16(b[4:]))
	if n > len(b) || n < 40+8+40 {
		return t, false
	}
	icmp := b[40:n]
	if sum16(sum32(b[8:40])+uint64(len(icmp))+protoICMPv6, icmp) != 0xffff {
		return t, false
	}
	q := icmp[8:]
	if q[0]>>4 != 6 {
		return t, false
	}
	mtu := binary.BigEndian.Uint32(icmp[4:])
	if mtu > 65535 {
		return t, false
	}
	t.MTU = int(mtu)
	t.Src, t.Dst = netip.AddrFrom16([16]byte(q[8:24])), netip.AddrFrom16([16]byte(q[24:40]))
	next, u := q[6], q[40:]
	if next == protoFragment && len(u) >= 8 && binary.BigEndian.Uint16(u[2:])&0xfff8 == 0 {
		next, u = u[0], u[8:]
	}
	return t, t.upper(next, u)
}

// upper reads what the quoted packet carried.
func (t *TooBig) upper(proto byte, u []byte) bool {
	t.Proto = proto
	switch {
	case proto == protoESP && len(u) >= 4:
		t.SPI = binary.BigEndian.Uint32(u)
		return true
	case proto == protoAH && len(u) >= 8:
		t.SPI = binary.BigEndian.Uint32(u[4:])
		return true
	case proto == protoUDP && len(u) >= 8:
		t.SrcPort, t.DstPort = binary.BigEndian.Uint16(u), binary.BigEndian.Uint16(u[2:])
		if len(u) >= 12 {
			t.SPI = binary.BigEndian.Uint32(u[8:])
		}
		return t.SrcPort == portNATT || t.DstPort == portNATT
	}
	return false
}

// plateau guesses for routers older than RFC 1191 (its section 7.1).
func plateau(total int) int {
	for _, p := range [...]int{32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296} {
		if p < total {
			return p
		}
	}
	return 68
}

func sum32(b []byte) uint64 {
	s := uint64(0)
	for ; len(b) >= 2; b = b[2:] {
		s += uint64(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

// sum16 is the folded Internet checksum of b on top of s (RFC 1071).
func sum16(s uint64, b []byte) uint16 {
	s += sum32(b)
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

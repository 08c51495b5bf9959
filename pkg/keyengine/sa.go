package keyengine

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net/netip"
	"syscall"

	"github.com/missiu/missiu/pkg/crypto/aead"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/crypto/mac"
	"github.com/missiu/missiu/pkg/datapath/aggfrag"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/ipcomp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/replay"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// record is what the engine keeps of an SA beside the SAD. There may be hundreds
// of thousands, so nothing that the SAD has stands here, and nothing that only
// some SAs need.
type record struct {
	sa         *sad.SA
	encr, auth ipsec.Key
	life       *lives // in force; SAs share it
	timer      *timer // nil: none was ever needed
	seq        uint32 // of the ACQUIRE
	counted    bool   // in overhead
	idle       bool   // dying since it is not used

	prev, next *record // in the order of making
}

// lives are the limits of an SA.
type lives struct {
	Hard, Soft ipsec.Lifetime
	Idle       ipsec.Idle
}

func livesOf(p *ipsec.SAParams) *lives { return &lives{p.Hard, p.Soft, p.Idle} }

// lives is livesOf, and that of the SA before if it is the same.
func (e *Engine) lives(p *ipsec.SAParams) *lives {
	if l := livesOf(p); e.life == nil || *l != *e.life {
		e.life = l
	}
	return e.life
}

// params are the parameters with the keys, which stay the record's, and with the
// limits in force.
func (r *record) params() ipsec.SAParams {
	p := r.sa.P
	p.EncrKey, p.AuthKey = r.encr, r.auth
	p.Hard, p.Soft, p.Idle = r.life.Hard, r.life.Soft, r.life.Idle
	return p
}

type protoSPI struct {
	proto ipsec.Protocol
	spi   ipsec.SPI
}

// Range of SPIs where the client names none (as Linux).
const (
	defaultMinSPI = ipsec.MinSPI
	defaultMaxSPI = ipsec.SPI(0x0fffffff)
	// CPIs have 16 bits, of which those from 61440 up are private (RFC 3173, 3.3).
	defaultMaxCPI = ipsec.SPI(ipcomp.MaxNegotiated)
	maxCPI        = ipsec.SPI(ipcomp.MaxCPI)
)

// GetSPI implements keysock.Backend: it makes a larval SA with a random SPI
// that no SA of the protocol has. SPIs 1-255 are reserved (RFC 4303, 2.1):
// a range that starts below 256 is cut there.
func (e *Engine) GetSPI(g keysock.GetSPI) (*keysock.SAInfo, error) {
	defer e.arm()
	if err := supported(g.Proto); err != nil {
		return nil, err
	}
	if !g.Dst.IsValid() || g.Src.IsValid() && g.Src.BitLen() != g.Dst.BitLen() {
		return nil, refuse(syscall.EINVAL, "addresses")
	}
	lo, hi := g.Min, g.Max
	if lo == 0 && hi == 0 {
		if lo, hi = defaultMinSPI, defaultMaxSPI; g.Proto == ipsec.IPComp {
			hi = defaultMaxCPI
		}
	}
	if g.Proto == ipsec.IPComp && hi > maxCPI {
		return nil, refuse(syscall.EINVAL, "CPI range")
	}
	lo = max(lo, ipsec.MinSPI)
	if lo > hi {
		return nil, refuse(syscall.EINVAL, "SPI range")
	}
	if int(g.Queue) > max(1, e.o.Queues) {
		return nil, refuse(syscall.EINVAL, "no such queue")
	}
	spi, ok := e.freeSPI(g.Proto, lo, hi, g.Queue)
	if !ok {
		return nil, refuse(syscall.EEXIST, "no SPI free in the range")
	}
	p := ipsec.SAParams{
		SAID: ipsec.SAID{Proto: g.Proto, Dst: g.Dst, SPI: spi},
		Src:  g.Src, Mode: g.Mode, ReqID: g.ReqID, Encap: g.Encap, Queue: g.Queue,
		Hard: ipsec.Lifetime{AddTime: LarvalLife},
	}
	if p.Mode == ipsec.ModeAny {
		p.Mode = ipsec.Transport
	}
	now := e.o.Now()
	r := &record{sa: sad.NewLarval(&p, now), life: e.lives(&p), seq: g.Seq}
	if !e.o.SAD.Insert(r.sa) {
		return nil, refuse(syscall.EEXIST, "SA exists")
	}
	e.remember(r)
	e.schedule(r, now)
	return r.info(), nil
}

// freeSPI picks a random free SPI, which for a queue is one of its own if the
// range has any. When guessing does not succeed soon it
// looks at one after the other: n SAs cannot fill more than n in a row.
func (e *Engine) freeSPI(proto ipsec.Protocol, lo, hi ipsec.SPI, q ipsec.Queue) (ipsec.SPI, bool) {
	if n := ipsec.SPI(e.o.Queues); n > 1 && q != 0 && hi-lo >= n {
		// Count multiples of n instead.
		low := lo - lo%n
		if low+ipsec.SPI(q-1) < lo {
			low += n
		}
		low += ipsec.SPI(q - 1)
		return e.freeOf(proto, low, n, uint64((hi-low)/n)+1)
	}
	return e.freeOf(proto, lo, 1, uint64(hi-lo)+1)
}

// freeOf is freeSPI of size numbers from lo on, step by step.
func (e *Engine) freeOf(proto ipsec.Protocol, lo, step ipsec.SPI, size uint64) (ipsec.SPI, bool) {
	var at uint64
	for range 32 {
		var b [8]byte
		rand.Read(b[:])
		// The bias of the remainder, 2^-32 at most, tells nobody anything.
		at = binary.LittleEndian.Uint64(b[:]) % size
		if spi := lo + ipsec.SPI(at)*step; e.spis[protoSPI{proto, spi}] == 0 {
			return spi, true
		}
	}
	for range min(size, uint64(len(e.spis))+1) {
		at = (at + 1) % size
		if spi := lo + ipsec.SPI(at)*step; e.spis[protoSPI{proto, spi}] == 0 {
			return spi, true
		}
	}
	return 0, false
}

// Add implements keysock.Backend.
func (e *Engine) Add(p *ipsec.SAParams, seq uint32) (*keysock.SAInfo, error) {
	defer e.arm()
	if err := e.check(p); err != nil {
		p.Wipe()
		return nil, err
	}
	if e.recs[p.SAID] != nil {
		p.Wipe()
		return nil, refuse(syscall.EEXIST, "SA exists")
	}
	return e.install(p, seq, nil)
}

// Update implements keysock.Backend. A larval SA, which only a negotiation makes,
// becomes mature, but not with legacy algorithms; of another
// one limits and UDP ports change, and keys or algorithms that differ are
// refused (RFC 2367, 3.1.3).
func (e *Engine) Update(p *ipsec.SAParams, seq uint32) (*keysock.SAInfo, error) {
	defer e.arm()
	r := e.recs[p.SAID]
	if r == nil {
		p.Wipe()
		return nil, refuse(syscall.ESRCH, "no such SA")
	}
	if r.sa.State() == sad.Larval {
		if p.Encr.Legacy() || p.Auth.Legacy() {
			p.Wipe()
			return nil, refuse(syscall.ENOSYS, "a legacy algorithm in a negotiated SA; manual keys are added")
		}
		if err := e.check(p); err != nil {
			p.Wipe()
			return nil, err
		}
		return e.install(p, seq, r)
	}
	defer p.Wipe()
	q := r.params()
	if err := sameSA(&q, p); err != nil {
		return nil, err
	}
	if err := sameEncap(&q, p); err != nil {
		return nil, err
	}
	return e.change(r, p)
}

// sameSA refuses changes that a mature SA does not take.
func sameSA(q, p *ipsec.SAParams) error {
	switch {
	case p.Encr != q.Encr || p.Auth != q.Auth || !p.EncrKey.Equal(q.EncrKey) || !p.AuthKey.Equal(q.AuthKey):
		return refuse(syscall.EINVAL, "keys or algorithms of a mature SA do not change")
	case p.Queue != q.Queue:
		return refuse(syscall.EINVAL, "the queue of a mature SA does not change")
	case p.Mode != q.Mode || p.AggFrag != q.AggFrag || p.TFC != q.TFC || p.CPI != q.CPI:
		return refuse(syscall.EINVAL, "the mode of a mature SA does not change")
	}
	return nil
}

// sameEncap refuses what only an SA that moves may do.
func sameEncap(q, p *ipsec.SAParams) error {
	if (p.Encap == nil) != (q.Encap == nil) {
		return refuse(syscall.EINVAL, "an SA with UDP encapsulation does not lose it, nor gain it")
	}
	return nil
}

// change gives a mature SA the limits and ports of p.
func (e *Engine) change(r *record, p *ipsec.SAParams) (*keysock.SAInfo, error) {
	if p.Encap != nil && *p.Encap != *r.sa.P.Encap {
		n := r.sa.WithEncap(p.Encap)
		if !e.o.SAD.Replace(r.sa, n) {
			return nil, refuse(syscall.ESRCH, "no such SA")
		}
		r.sa = n
	}
	r.life, r.idle = e.lives(p), false
	r.sa.SetLimits(p.Soft, p.Hard)
	e.o.SAD.SetState(r.sa, sad.Mature)
	e.schedule(r, e.o.Now())
	return r.info(), nil
}

// install makes a mature SA, in the place of the larval one if there is one.
// The keys of p become the record's, or are wiped.
func (e *Engine) install(p *ipsec.SAParams, seq uint32, larval *record) (*keysock.SAInfo, error) {
	sa, err := e.make(p)
	if err != nil {
		p.Wipe()
		return nil, err
	}
	return e.put(p, sa, seq, larval)
}

// make makes what the data path works with.
func (e *Engine) make(p *ipsec.SAParams) (*sad.SA, error) {
	p.ReplayWindow = min(p.ReplayWindow, replay.MaxSize)
	p.Unauthenticated = e.o.AllowUnauthenticated
	sa, err := sad.New(p, e.o.Now())
	if err != nil {
		errno := syscall.EINVAL
		if u := (*aead.UnsupportedError)(nil); errors.As(err, &u) {
			errno = syscall.ENOSYS
		}
		if u := (*mac.UnsupportedError)(nil); errors.As(err, &u) {
			errno = syscall.ENOSYS
		}
		return nil, wrap(errno, "transform", err)
	}
	return sa, nil
}

// put is the end of install.
func (e *Engine) put(p *ipsec.SAParams, sa *sad.SA, seq uint32, larval *record) (*keysock.SAInfo, error) {
	now := e.o.Now()
	r := larval
	if r == nil {
		r = &record{sa: sa, seq: seq}
		if !e.o.SAD.Insert(sa) {
			p.Wipe()
			return nil, refuse(syscall.EEXIST, "SA exists")
		}
		e.remember(r)
	} else {
		if !e.o.SAD.Replace(r.sa, sa) {
			p.Wipe()
			return nil, refuse(syscall.ESRCH, "no such SA")
		}
		r.sa = sa
		if seq != 0 {
			r.seq = seq
		}
	}
	r.encr, r.auth, r.life, r.counted = p.EncrKey, p.AuthKey, e.lives(p), true
	e.addOverhead(overheadOf(sa), 1)
	e.schedule(r, now)
	e.answered(r, seq)
	return r.info(), nil
}

// check refuses what no SA can be.
func (e *Engine) check(p *ipsec.SAParams) error {
	if err := supported(p.Proto); err != nil {
		return err
	}
	switch {
	case p.SPI < ipsec.MinSPI && (p.Proto != ipsec.IPComp || p.SPI != ipcomp.CPIDeflate):
		return refuse(syscall.EINVAL, "reserved SPI")
	case !p.Src.IsValid() || !p.Dst.IsValid() || p.Src.BitLen() != p.Dst.BitLen() || p.Dst.Is4In6() || p.Src.Is4In6():
		return refuse(syscall.EINVAL, "addresses")
	case p.Mode != ipsec.Transport && p.Mode != ipsec.Tunnel:
		return refuse(syscall.EINVAL, "mode")
	case ipsec.Open(p.Dst) || ipsec.Open(p.Src) && (p.Mode == ipsec.Tunnel || p.Encap != nil):
		// Any source is for transport mode; elsewhere it is what we write.
		return refuse(syscall.EINVAL, "addresses")
	case (p.Encr.Legacy() || p.Auth.Legacy()) && !e.o.AllowLegacy:
		if e.o.LegacyRefused != nil {
			e.o.LegacyRefused(p.SAID, p.Encr, p.Auth)
		}
		return refuse(syscall.ENOSYS, "a legacy algorithm, which only missiu --allow-legacy takes")
	}
	if old := p.Encr.Info().Old || p.Auth.Info().Old; old && (p.ReplayWindow != 0 || p.ESN) {
		// There is no sequence number (RFC 1826, RFC 1827).
		return refuse(syscall.EINVAL, "a replay window for headers without sequence number")
	}
	if !sad.CheckLastSeq(p) {
		return refuse(syscall.EINVAL, "no sequence number behind the last one")
	}
	if p.AggFrag && (p.Proto != ipsec.ESP || p.Mode != ipsec.Tunnel || p.Encr.Info().Old) {
		return refuse(syscall.EINVAL, "AGGFRAG for other than ESP in tunnel mode")
	}
	if p.TFC != 0 && (p.Proto != ipsec.ESP || p.Mode != ipsec.Tunnel || p.AggFrag) {
		// Only an inner IP header tells where the data ends (RFC 4303, 2.7).
		return refuse(syscall.EINVAL, "TFC padding for other than ESP in tunnel mode")
	}
	if p.CPI != 0 && (p.Proto == ipsec.IPComp || p.AggFrag || p.TFC != 0 || p.Encr.Info().Old || p.Auth.Info().Old) {
		return refuse(syscall.EINVAL, "a CPI for other than ESP and AH, or with AGGFRAG or TFC padding")
	}
	switch p.Proto {
	case ipsec.AH:
		if p.Encr != alg.EncrNone || p.Auth == alg.IntegNone || p.Encap != nil {
			return refuse(syscall.EINVAL, "AH with encryption, without integrity, or in UDP")
		}
		return nil
	case ipsec.IPComp:
		if p.SPI > maxCPI || p.Encr != alg.EncrNone || p.Auth != alg.IntegNone || p.Encap != nil {
			return refuse(syscall.EINVAL, "IPComp with a CPI beyond 16 bits, keys, or in UDP")
		}
		return nil
	}
	switch {
	case p.Encr == alg.EncrNone:
		return refuse(syscall.EINVAL, "ESP without encryption algorithm")
	case p.Auth.Info().AHOnly:
		return refuse(syscall.EINVAL, "ESP with an integrity algorithm of AH")
	case p.Encr.Info().Old && (p.Auth != alg.IntegNone || p.Encap != nil):
		return refuse(syscall.EINVAL, "the ESP of RFC 1827 with integrity or in UDP")
	case p.Auth == alg.IntegNone && p.Encr == alg.EncrNULL:
		return refuse(syscall.EINVAL, "neither encryption nor integrity")
	case p.Auth == alg.IntegNone && !p.Encr.Info().AEAD && (!e.o.AllowUnauthenticated || p.Encr.Info().Counter):
		// What can be altered unnoticed can be read by and by (RFC 4303, 1),
		// and in counter mode at once (RFC 3686, 4).
		return refuse(syscall.EINVAL, "ESP without integrity")
	}
	return nil
}

func supported(p ipsec.Protocol) error {
	switch p {
	case ipsec.ESP, ipsec.AH, ipsec.IPComp:
		return nil
	}
	return refuse(syscall.EINVAL, p.String())
}

// Delete implements keysock.Backend.
func (e *Engine) Delete(id ipsec.SAID, _ netip.Addr) (*keysock.SAInfo, error) {
	defer e.arm()
	r := e.recs[id]
	if r == nil {
		return nil, refuse(syscall.ESRCH, "no such SA")
	}
	e.remove(r)
	return r.info(), nil
}

// Get implements keysock.Backend.
func (e *Engine) Get(id ipsec.SAID, _ netip.Addr) (*keysock.SAInfo, error) {
	r := e.recs[id]
	if r == nil {
		return nil, refuse(syscall.ESRCH, "no such SA")
	}
	return r.full(), nil
}

// Flush implements keysock.Backend.
func (e *Engine) Flush(proto ipsec.Protocol) (removed bool) {
	defer e.arm()
	for id, r := range e.recs {
		if proto == 0 || proto == id.Proto {
			e.remove(r)
			removed = true
		}
	}
	return removed
}

// SAIDs implements keysock.Backend; oldest first.
func (e *Engine) SAIDs(proto ipsec.Protocol) []ipsec.SAID {
	l := make([]ipsec.SAID, 0, len(e.recs))
	for r := e.first; r != nil; r = r.next {
		if id := r.sa.P.SAID; proto == 0 || proto == id.Proto {
			l = append(l, id)
		}
	}
	return l
}

func (e *Engine) remember(r *record) {
	e.mu.Lock()
	e.recs[r.sa.P.SAID] = r
	e.mu.Unlock()
	e.spis[protoSPI{r.sa.P.Proto, r.sa.P.SPI}]++
	if r.prev = e.last; r.prev != nil {
		r.prev.next = r
	} else {
		e.first = r
	}
	e.last = r
}

// unlink takes r out of the list of all.
func (e *Engine) unlink(r *record) {
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		e.first = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	} else {
		e.last = r.prev
	}
	r.prev, r.next = nil, nil
}

// remove takes an SA out of everything and wipes its keys.
func (e *Engine) remove(r *record) {
	e.o.SAD.Remove(r.sa)
	e.unlink(r)
	if r.timer != nil {
		e.timers.stop(r.timer)
	}
	id := r.sa.P.SAID
	e.mu.Lock()
	delete(e.recs, id)
	delete(e.mapped, id)
	e.mu.Unlock()
	k := protoSPI{id.Proto, id.SPI}
	if e.spis[k]--; e.spis[k] == 0 {
		delete(e.spis, k)
	}
	r.encr.Wipe()
	r.auth.Wipe()
	r.encr, r.auth = ipsec.Key{}, ipsec.Key{}
	if r.counted {
		e.addOverhead(overheadOf(r.sa), -1)
	}
	if e.o.Removed != nil {
		e.o.Removed(r.sa)
	}
}

// overhead is what an SA adds to a packet; the zero value is nothing.
type overhead struct {
	proto ipsec.Protocol
	fixed int // octets in front of ESP; AH, or the IP header of a tunnel
	kept  int // octets of the packet that are not payload of ESP; below 0: payload beside it
	esp   esp.Overhead
}

// overheadOf is that of sa. In transport mode packets have an IP header without
// options.
func overheadOf(sa *sad.SA) overhead {
	o := overhead{proto: sa.P.Proto}
	ip, tunnel := packet.IPv4Len, sa.P.Mode == ipsec.Tunnel
	if sa.P.Dst.Is6() {
		ip = packet.IPv6Len
	}
	switch {
	case sa.T != nil:
		o.fixed, o.esp = ip, sa.T.Overhead()
		if sa.P.Encap != nil {
			o.fixed += packet.UDPLen
		}
		switch {
		case sa.P.AggFrag:
			o.kept = -aggfrag.HeaderLen
		case !tunnel:
			o.kept = ip
		}
		return o
	case sa.AH != nil:
		o.fixed = sa.AH.HeaderLen(sa.P.Dst.Is6())
	case !tunnel: // IPComp never makes a packet longer
		return overhead{}
	}
	if tunnel {
		o.fixed += ip
	}
	return o
}

// addOverhead counts SAs by what they add.
func (e *Engine) addOverhead(o overhead, d int) {
	if o == (overhead{}) {
		return
	}
	was := len(e.overhead)
	if e.overhead[o] += d; e.overhead[o] == 0 {
		delete(e.overhead, o)
	}
	if len(e.overhead) != was && e.o.Overhead != nil {
		e.o.Overhead()
	}
}

// InnerMTU is the length in octets of the longest packet that any SA in the SAD
// makes no more than link octets of; link itself without SAs. Bundles have one
// SA of each protocol: IPComp in ESP in AH, so the largest of each counts.
func (e *Engine) InnerMTU(link int) int {
	var ah, comp int
	for o := range e.overhead { // few
		switch o.proto {
		case ipsec.AH:
			ah = max(ah, o.fixed)
		case ipsec.IPComp:
			comp = max(comp, o.fixed)
		}
	}
	mtu := link - ah
	for o := range e.overhead {
		if o.proto == ipsec.ESP {
			mtu = min(mtu, o.esp.MaxPayload(link-ah-o.fixed)+o.kept)
		}
	}
	return mtu - comp
}

// info describes the SA without keys.
func (r *record) info() *keysock.SAInfo {
	i := &keysock.SAInfo{
		SAParams: r.params(), State: keysock.State(r.sa.State()), Seq: r.seq,
		Packets: r.sa.Packets(), Bytes: r.sa.Bytes(),
		Added: r.sa.Created(), FirstUsed: r.sa.FirstUsed(),
	}
	i.EncrKey, i.AuthKey, i.LastSeq = ipsec.Key{}, ipsec.Key{}, r.sa.LastSeq()
	return i
}

// full describes the SA with keys of its own.
func (r *record) full() *keysock.SAInfo {
	i := r.info()
	i.EncrKey, i.AuthKey = r.encr.Clone(), r.auth.Clone()
	return i
}

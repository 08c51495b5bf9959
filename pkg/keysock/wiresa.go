package keysock

import (
	"math"
	"net/netip"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// ownSeq is set in the sequence numbers that clients of this package make up, and
// never in those of an ACQUIRE, so that no request answers one by accident.
const ownSeq = 1 << 31

// acquireSeq returns the seq of a request as far as it may be an ACQUIRE's.
func acquireSeq(seq uint32) uint32 {
	if seq&ownSeq != 0 {
		return 0
	}
	return seq
}

// What of an SA goes into a message.
const (
	withKeys    = 1 << iota // key material
	withPrivate             // private extensions
	withCurrent             // LIFETIME_CURRENT, and limits even if there are none
)

// putSA sets the extensions of an SA. Keys in m are those of i, not copies.
func putSA(m *pfkey.Message, i *SAInfo, what int) error {
	var err error
	if m.SAType, err = saTypeOf(i.Proto); err != nil {
		return err
	}
	sa := &pfkey.SA{SPI: uint32(i.SPI), Replay: uint8(min(i.ReplayWindow, 255)), State: pfkey.SAState(i.State)}
	if sa.Encrypt, err = encrToWire(i.Encr); err != nil {
		return err
	}
	if i.Proto == ipsec.IPComp && i.State != Larval {
		sa.Encrypt = pfkey.EncrAlg(pfkey.CompDeflate)
	}
	if sa.Auth, err = integToWire(i.Auth); err != nil {
		return err
	}
	if i.ESN {
		sa.Flags |= pfkey.FlagXESN
	}
	m.SA = sa
	m.SA2 = &pfkey.SA2{Mode: pfkey.Mode(i.Mode), ReqID: uint32(i.ReqID)}
	putAddrs(m, i.Src, i.Dst)
	if what&withCurrent != 0 {
		m.Current = &pfkey.Lifetime{
			Allocations: clip32(i.Packets), Bytes: i.Bytes, AddTime: unixTime(i.Added), UseTime: unixTime(i.FirstUsed),
		}
	}
	if what&withCurrent != 0 || !i.Hard.IsZero() || !i.Soft.IsZero() {
		m.Hard, m.Soft = lifetimeToWire(i.Hard), lifetimeToWire(i.Soft)
	}
	if e := i.Encap; e != nil {
		m.NATT = &pfkey.NATT{Type: pfkey.NATTESP}
		m.NATTSPort, m.NATTDPort = &pfkey.NATTPort{Port: e.SPort}, &pfkey.NATTPort{Port: e.DPort}
		if e.OA.IsValid() {
			m.NATTOA = hostAddr(e.OA)
		}
	}
	if what&withKeys != 0 {
		if i.Encr != alg.EncrNone {
			m.EncrKey = pfkey.NewKey(i.EncrKey.Bytes())
		}
		if i.Auth != alg.IntegNone {
			m.AuthKey = pfkey.NewKey(i.AuthKey.Bytes())
		}
	}
	if what&withPrivate != 0 {
		m.SAMore = &pfkey.SAMore{
			ESN: i.ESN, AggFrag: i.AggFrag, TFC: i.TFC, Replay: i.ReplayWindow, AcquireSeq: i.Seq,
			Packets: i.Packets, HardPackets: i.Hard.Packets, SoftPackets: i.Soft.Packets,
		}
		m.TSSrc, m.TSDst = tsToWire(i.SrcTS), tsToWire(i.DstTS)
		if i.LastSeq != 0 {
			m.SASeq = &pfkey.Count{N: i.LastSeq}
		}
		if i.CPI != 0 {
			m.SACPI = &pfkey.Count{N: uint64(i.CPI)}
		}
		if i.Queue != 0 || i.PerQueue {
			m.Queue = &pfkey.Queue{N: uint16(i.Queue), More: i.PerQueue}
		}
		if h := i.Home; h != nil {
			m.HomeSrc, m.HomeDst = hostAddr(h.Src), hostAddr(h.Dst)
		}
		if i.Idle != (ipsec.Idle{}) {
			m.Idle = &pfkey.Lifetime{AddTime: seconds(i.Idle.AddTime), UseTime: seconds(i.Idle.UseTime)}
		}
	}
	return nil
}

// takeSA reads what putSA wrote. Keys are copies.
func takeSA(m *pfkey.Message) (*SAInfo, error) {
	i := &SAInfo{}
	var err error
	if i.SAID, i.Src, err = takeSAID(m); err != nil {
		return nil, err
	}
	i.State = State(m.SA.State)
	if i.Proto == ipsec.IPComp {
		err = compFromWire(pfkey.CompAlg(m.SA.Encrypt))
	} else {
		i.Encr, err = encrFromWire(m.SA.Encrypt)
	}
	if err != nil {
		return nil, err
	}
	if i.Auth, err = integFromWire(m.SA.Auth); err != nil {
		return nil, err
	}
	i.ReplayWindow = uint32(m.SA.Replay)
	i.ESN = m.SA.Flags&pfkey.FlagXESN != 0
	if i.Mode, i.ReqID, err = takeSA2(m); err != nil {
		return nil, err
	}
	if (m.Hard == nil) != (m.Soft == nil) {
		return nil, refuse(syscall.EINVAL, "one of LIFETIME_HARD and LIFETIME_SOFT alone")
	}
	i.Hard, i.Soft = lifetimeFromWire(m.Hard), lifetimeFromWire(m.Soft)
	if c := m.Current; c != nil {
		i.Packets, i.Bytes, i.Added, i.FirstUsed = uint64(c.Allocations), c.Bytes, date(c.AddTime), date(c.UseTime)
	}
	if i.Encap, err = takeEncap(m); err != nil {
		return nil, err
	}
	if i.Encap != nil && i.Proto != ipsec.ESP {
		return nil, refuse(syscall.EINVAL, "UDP encapsulation of %v", i.Proto)
	}
	if more := m.SAMore; more != nil {
		i.ESN, i.AggFrag, i.TFC, i.ReplayWindow, i.Seq = more.ESN, more.AggFrag, more.TFC, more.Replay, more.AcquireSeq
		i.Packets, i.Hard.Packets, i.Soft.Packets = more.Packets, more.HardPackets, more.SoftPackets
	}
	if m.SASeq != nil {
		i.LastSeq = m.SASeq.N
	}
	if m.SACPI != nil {
		if m.SACPI.N > uint64(maxCPI) {
			return nil, refuse(syscall.EINVAL, "CPI %d", m.SACPI.N)
		}
		i.CPI = uint16(m.SACPI.N)
	}
	if q := m.Queue; q != nil {
		if q.N != 0 && q.More {
			return nil, refuse(syscall.EINVAL, "SA for queue %d and for others", q.N)
		}
		i.Queue, i.PerQueue = ipsec.Queue(q.N), q.More
	}
	if i.Home, err = takeHome(m, i.Mode); err != nil {
		return nil, err
	}
	if l := m.Idle; l != nil {
		if l.Allocations != 0 || l.Bytes != 0 {
			return nil, refuse(syscall.EINVAL, "LIFETIME_IDLE of allocations or octets")
		}
		i.Idle = ipsec.Idle{AddTime: duration(l.AddTime), UseTime: duration(l.UseTime)}
	}
	if i.SrcTS, err = tsFromWire(m.TSSrc); err != nil {
		return nil, err
	}
	if i.DstTS, err = tsFromWire(m.TSDst); err != nil {
		return nil, err
	}
	for _, k := range []*pfkey.Key{m.EncrKey, m.AuthKey} {
		if k != nil && k.Bits%8 != 0 {
			return nil, refuse(syscall.EINVAL, "key of %d bits", k.Bits)
		}
	}
	if k := m.EncrKey; k != nil {
		i.EncrKey = ipsec.NewKey(k.Key).Clone()
	}
	if k := m.AuthKey; k != nil {
		i.AuthKey = ipsec.NewKey(k.Key).Clone()
	}
	return i, nil
}

// takeParams is takeSA for ADD and UPDATE: what an SA needs has to be there.
func takeParams(m *pfkey.Message) (*ipsec.SAParams, error) {
	if m.SAType == pfkey.SATypeIPComp && m.SA != nil && m.SA.Encrypt == pfkey.EncrNone {
		return nil, refuse(syscall.EINVAL, "IPComp without an algorithm")
	}
	i, err := takeSA(m)
	if err != nil {
		return nil, err
	}
	p := &i.SAParams
	if err := checkParams(p); err != nil {
		p.Wipe()
		return nil, err
	}
	return p, nil
}

func checkParams(p *ipsec.SAParams) error {
	if p.SPI < ipsec.MinSPI && (p.Proto != ipsec.IPComp || p.SPI != wellKnownDeflate) {
		return refuse(syscall.EINVAL, "SPI %v is reserved", p.SPI)
	}
	ei, ai := p.Encr.Info(), p.Auth.Info()
	switch p.Proto {
	case ipsec.AH:
		if p.Encr != alg.EncrNone || p.Auth == alg.IntegNone {
			return refuse(syscall.EINVAL, "AH with encryption %v, authentication %v", p.Encr, p.Auth)
		}
		// A key without an algorithm is not for anything (as in Linux).
		p.EncrKey.Wipe()
		p.EncrKey = ipsec.Key{}
	case ipsec.ESP:
		if p.Encr == alg.EncrNone || (ei.AEAD || ei.Old || ai.AHOnly) && p.Auth != alg.IntegNone {
			return refuse(syscall.EINVAL, "ESP with encryption %v, authentication %v", p.Encr, p.Auth)
		}
	case ipsec.IPComp:
		if p.SPI > maxCPI {
			return refuse(syscall.EINVAL, "CPI %v", p.SPI)
		}
		// Neither keys nor sequence numbers, whatever clients send of them.
		p.Wipe()
		p.EncrKey, p.Auth, p.AuthKey, p.ReplayWindow, p.ESN = ipsec.Key{}, alg.IntegNone, ipsec.Key{}, 0, false
		p.LastSeq = 0
	default:
		return refuse(syscall.EPROTONOSUPPORT, "%v", p.Proto)
	}
	if p.Encr != alg.EncrNone {
		bits := 0
		if n := p.EncrKey.Len(); n > 0 {
			bits = (n - ei.SaltLen) * 8
		}
		if n, ok := p.Encr.KeyLen(bits); !ok || n != p.EncrKey.Len() {
			return refuse(syscall.EINVAL, "%v with a key of %d octets", p.Encr, p.EncrKey.Len())
		}
		if err := p.Encr.CheckKey(p.EncrKey.Bytes()); err != nil {
			return refuse(syscall.EINVAL, "%v with %v", p.Encr, err)
		}
	}
	if p.Auth == alg.IntegNone {
		p.AuthKey.Wipe()
		p.AuthKey = ipsec.Key{}
	} else if p.AuthKey.Len() != ai.KeyLen {
		return refuse(syscall.EINVAL, "%v with a key of %d octets", p.Auth, p.AuthKey.Len())
	}
	return nil
}

// takeSAID reads what names an SA: type, SA and both addresses.
func takeSAID(m *pfkey.Message) (id ipsec.SAID, src netip.Addr, err error) {
	if m.SA == nil {
		return id, src, refuse(syscall.EINVAL, "no SA extension")
	}
	if id.Proto, err = protoOf(m.SAType); err != nil {
		return id, src, err
	}
	if id.Proto == 0 {
		return id, src, refuse(syscall.EINVAL, "no SA type")
	}
	id.SPI = ipsec.SPI(m.SA.SPI)
	src, id.Dst, err = takeAddrs(m)
	return id, src, err
}

func takeSA2(m *pfkey.Message) (ipsec.Mode, ipsec.ReqID, error) {
	if m.SA2 == nil {
		return ipsec.Transport, 0, nil
	}
	mode, err := modeFromWire(m.SA2.Mode)
	if mode == ipsec.ModeAny {
		mode = ipsec.Transport
	}
	return mode, ipsec.ReqID(m.SA2.ReqID), err
}

func modeFromWire(m pfkey.Mode) (ipsec.Mode, error) {
	if m > pfkey.ModeTunnel {
		return 0, refuse(syscall.EINVAL, "mode %v", m)
	}
	return ipsec.Mode(m), nil
}

// takeAddrs reads SRC and DST of an SA, whose ports, prefixes and protocols mean
// nothing.
func takeAddrs(m *pfkey.Message) (src, dst netip.Addr, err error) {
	if m.Src == nil || m.Dst == nil {
		return src, dst, refuse(syscall.EINVAL, "addresses missing")
	}
	src, dst = m.Src.Addr.Addr(), m.Dst.Addr.Addr()
	if src.BitLen() != dst.BitLen() {
		return src, dst, refuse(syscall.EINVAL, "addresses of two families")
	}
	if src.Is4In6() || dst.Is4In6() {
		return src, dst, refuse(syscall.EINVAL, "IPv4-mapped address")
	}
	return src, dst, nil
}

func putAddrs(m *pfkey.Message, src, dst netip.Addr) { m.Src, m.Dst = hostAddr(src), hostAddr(dst) }

func hostAddr(a netip.Addr) *pfkey.Address {
	return &pfkey.Address{PrefixLen: uint8(a.BitLen()), Addr: netip.AddrPortFrom(a, 0)}
}

func takeEncap(m *pfkey.Message) (*ipsec.Encap, error) {
	if m.NATT == nil || m.NATT.Type == pfkey.NATTNone {
		return nil, nil
	}
	if m.NATT.Type != pfkey.NATTESP {
		return nil, refuse(syscall.EINVAL, "UDP encapsulation %v", m.NATT.Type)
	}
	if m.NATTSPort == nil || m.NATTDPort == nil || m.NATTSPort.Port == 0 || m.NATTDPort.Port == 0 {
		return nil, refuse(syscall.EINVAL, "UDP encapsulation without ports")
	}
	e := &ipsec.Encap{SPort: m.NATTSPort.Port, DPort: m.NATTDPort.Port}
	if m.NATTOA != nil {
		if e.OA = m.NATTOA.Addr.Addr(); e.OA.Is4In6() {
			return nil, refuse(syscall.EINVAL, "IPv4-mapped original address")
		}
	}
	return e, nil
}

// takeHome reads the end points by which policy knows an SA of mode m.
func takeHome(m *pfkey.Message, mode ipsec.Mode) (*ipsec.Ends, error) {
	if m.HomeSrc == nil && m.HomeDst == nil {
		return nil, nil
	}
	if m.HomeSrc == nil || m.HomeDst == nil {
		return nil, refuse(syscall.EINVAL, "one of X_HOME_SRC and X_HOME_DST alone")
	}
	h := ipsec.Ends{Src: m.HomeSrc.Addr.Addr(), Dst: m.HomeDst.Addr.Addr()}
	switch {
	case mode != ipsec.Tunnel:
		return nil, refuse(syscall.EINVAL, "X_HOME_SRC of an SA in %v mode", mode)
	case h.Src.BitLen() != h.Dst.BitLen() || h.Src.Is4In6() || h.Dst.Is4In6() || ipsec.Open(h.Src) || ipsec.Open(h.Dst):
		return nil, refuse(syscall.EINVAL, "X_HOME_SRC %v, X_HOME_DST %v", h.Src, h.Dst)
	}
	return &h, nil
}

// lifetimeToWire rounds times up to seconds, since 0 would be no limit, and cuts
// packets at 32 bits, where X_SA_MORE has the number in full.
func lifetimeToWire(l ipsec.Lifetime) *pfkey.Lifetime {
	return &pfkey.Lifetime{
		Allocations: clip32(l.Packets), Bytes: l.Bytes, AddTime: seconds(l.AddTime), UseTime: seconds(l.UseTime),
	}
}

func lifetimeFromWire(l *pfkey.Lifetime) ipsec.Lifetime {
	if l == nil {
		return ipsec.Lifetime{}
	}
	return ipsec.Lifetime{
		Packets: uint64(l.Allocations), Bytes: l.Bytes, AddTime: duration(l.AddTime), UseTime: duration(l.UseTime),
	}
}

func clip32(n uint64) uint32 { return uint32(min(n, math.MaxUint32)) }

func seconds(d time.Duration) uint64 {
	if d <= 0 {
		return 0
	}
	return uint64((d-1)/time.Second) + 1
}

// duration takes more seconds than a Duration holds, which is 292 years, for that.
func duration(s uint64) time.Duration {
	return time.Duration(min(s, math.MaxInt64/uint64(time.Second))) * time.Second
}

func unixTime(t time.Time) uint64 {
	if t.IsZero() || t.Unix() < 0 {
		return 0
	}
	return uint64(t.Unix())
}

func date(s uint64) time.Time {
	if s == 0 || s > math.MaxInt32<<8 { // the year 19000
		return time.Time{}
	}
	return time.Unix(int64(s), 0)
}

func tsToWire(l []ipsec.TrafficSelector) *pfkey.TSList {
	if len(l) == 0 {
		return nil
	}
	w := &pfkey.TSList{TS: make([]pfkey.TS, len(l))}
	for i, t := range l {
		w.TS[i] = pfkey.TS{Proto: t.Proto, PortLo: t.PortLo, PortHi: t.PortHi, Start: t.Start, End: t.End}
	}
	return w
}

func tsFromWire(w *pfkey.TSList) ([]ipsec.TrafficSelector, error) {
	if w == nil || len(w.TS) == 0 {
		return nil, nil
	}
	l := make([]ipsec.TrafficSelector, len(w.TS))
	for i, t := range w.TS {
		opaque := t.PortLo == 65535 && t.PortHi == 0
		if t.End.Less(t.Start) || t.Start.Is4In6() || t.End.Is4In6() || t.PortLo > t.PortHi && !opaque {
			return nil, refuse(syscall.EINVAL, "traffic selector %v-%v", t.Start, t.End)
		}
		l[i] = ipsec.TrafficSelector{Proto: t.Proto, PortLo: t.PortLo, PortHi: t.PortHi, Start: t.Start, End: t.End}
	}
	return l, nil
}

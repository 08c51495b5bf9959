package datapath

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/datapath/aggfrag"
	"github.com/missiu/missiu/pkg/datapath/ah"
	"github.com/missiu/missiu/pkg/datapath/esp"
	"github.com/missiu/missiu/pkg/datapath/ipcomp"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/ipsec"
)

// MaxBundle is how many transforms may lie on one packet.
const MaxBundle = 6

// bundler is an outWorker's memory for transforms that do not go through the
// batch: AH, IPComp, and ESP with others around or inside it. Each has to see
// what the one before it made, so they run one packet at a time.
type bundler struct {
	esp     [1]esp.Packet
	ah      [1]ah.Packet
	ahs     ah.Scratch
	comp    ipcomp.Scratch
	packed  []byte      // what the compressor made; 65535 octets, from its first use on
	cur     packet.Info // the packet between two transforms
	missing []sad.OutKey
}

// bundle is the SAs for one packet, innermost first.
type bundle struct {
	sas [MaxBundle]*sad.SA
	n   int
}

// bundle protects a packet by the transforms of p, innermost first, or holds
// it until there is an SA for each that has to be. Those of level use are left
// out while they have none.
func (w *outWorker) bundle(p *spd.Entry, buf []byte, off, n int, now time.Time, whole bool) {
	var b bundle
	src, dst := w.info.Src, w.info.Dst
	missing := w.bundler.missing[:0]
	for k := range p.P.Requests {
		r := &p.P.Requests[k]
		key := outKey(r, src, dst)
		sa := w.find(p, key)
		switch {
		case sa != nil && r.Mode == ipsec.Tunnel:
			src, dst = sa.P.Src, sa.P.Dst
		case r.Mode == ipsec.Tunnel:
			src, dst = r.Src, r.Dst
		}
		switch {
		case sa != nil && b.n < MaxBundle:
			b.sas[b.n] = sa
			b.n++
		case r.AnyPeer() && r.Level != ipsec.LevelUse && p.P.Flags&ipsec.PolicyClear == 0:
			w.n.inc(DropOutNoPeer)
			return
		case r.AnyPeer() && r.Level != ipsec.LevelUse:
			w.pass(buf, off, n, whole)
			return
		case r.AnyPeer(): // nobody to ask
		case r.Level == ipsec.LevelUse:
			w.e.c.NeedSA(p, key, w.info.Flow())
		default:
			missing = append(missing, key)
		}
	}
	w.bundler.missing = missing
	if len(missing) > 0 && p.P.Flags&ipsec.PolicyClear != 0 {
		for _, key := range missing {
			w.e.c.NeedSA(p, key, w.info.Flow())
		}
		w.pass(buf, off, n, whole)
		return
	}
	if len(missing) > 0 {
		w.wait(p, missing, buf[off:off+n], now, whole)
		return
	}
	w.transform(&b, dst, buf, off, n, now, whole)
}

// transform protects a packet by the SAs of b; dst is where the result goes.
func (w *outWorker) transform(b *bundle, dst netip.Addr, buf []byte, off, n int, now time.Time, whole bool) {
	w.e.clampSYN(b, buf[off:off+n], &w.info, dst)
	packed := w.compress(b, buf, off, n)
	if packed != unpacked && b.sas[0].P.CPI != 0 {
		w.n.inc(OutCompressed)
	}
	if packed == unpacked && b.n > 0 && b.sas[0].P.Proto == ipsec.IPComp && b.sas[0].P.Mode != ipsec.Tunnel {
		copy(b.sas[:], b.sas[1:b.n]) // sent without IPComp header (RFC 3173, 2.2)
		b.n--
	}
	if b.n == 0 {
		w.pass(buf, off, n, whole)
		return
	}
	total := b.length(&w.info, n, packed)
	fragment := 0
	if mtu := w.e.c.Wire.PathMTU(dst); total > mtu {
		// What is told holds for packets that do not compress.
		if !whole && w.refuse(buf[off:off+n], b.innerMTU(&w.info, min(n, mtu), mtu), n) {
			return
		}
		fragment = mtu
	}
	if total > 65535 {
		w.n.inc(DropOutSeal)
		return
	}
	w.apply(b, buf, off, n, packed, fragment, now)
}

// unpacked says that a payload was not compressed.
const unpacked = -1

// compress tries the payload of a packet if the innermost SA is IPComp, or has it
// inside. It returns the length of what it made, which is in w.bundler.packed.
func (w *outWorker) compress(b *bundle, buf []byte, off, n int) int {
	if b.n == 0 || b.sas[0].P.Proto != ipsec.IPComp && b.sas[0].P.CPI == 0 {
		return unpacked
	}
	p := planFor(b.sas[0], &w.info, buf, off, n)
	return w.bundler.pack(buf[p.payload : off+n])
}

// pack compresses a payload to packed and returns its length then, or unpacked.
func (b *bundler) pack(payload []byte) int {
	if b.packed == nil {
		b.packed = make([]byte, 65535)
	}
	k, ok := b.comp.Compress(b.packed, payload)
	if !ok {
		return unpacked
	}
	return k
}

// length is that of the packet which the bundle makes of one of n octets, whose
// headers are i's, if IPComp makes packed octets of its payload.
func (b *bundle) length(i *packet.Info, n, packed int) int {
	kept, v6 := i.TransOff, i.Version == 6
	for k, sa := range b.sas[:b.n] {
		payload := n - kept
		if sa.P.Mode == ipsec.Tunnel {
			payload, kept, v6 = n, packet.IPv4Len, sa.P.Dst.Is6()
			if v6 {
				kept = packet.IPv6Len
			}
		}
		if k == 0 && packed != unpacked {
			payload = ipcomp.HeaderLen + packed
		}
		switch sa.P.Proto {
		case ipsec.IPComp:
		case ipsec.AH:
			payload += sa.AH.HeaderLen(v6)
		default:
			if sa.P.AggFrag {
				payload += aggfrag.HeaderLen
			}
			if sa.P.Encap != nil {
				payload += packet.UDPLen + sa.T.HeaderLen() + sa.T.TrailerLen(payload)
				break
			}
			payload += sa.T.HeaderLen() + sa.T.TrailerLen(payload)
		}
		n = kept + payload
	}
	return n
}

// apply carries the transforms out and queues the result.
func (w *outWorker) apply(b *bundle, buf []byte, off, n, packed, fragment int, now time.Time) {
	i := &w.info
	w.turn(b.sas[0]) // of SAs in a bundle it stands for the others
	w.count()
	for k, sa := range b.sas[:b.n] {
		if k > 0 {
			if i = &w.bundler.cur; !packet.Decode(buf[off:off+n], i) {
				w.n.inc(DropOutSeal)
				return
			}
		}
		if !w.account(sa, n, now) {
			return
		}
		p := planFor(sa, i, buf, off, n)
		if k == 0 && sa.P.CPI != 0 && packed != unpacked {
			n = p.putPacked(sa.P.CPI, buf, w.bundler.packed[:packed]) - off
		}
		ok := true
		switch sa.P.Proto {
		case ipsec.IPComp:
			off, n = w.putIPComp(sa, &p, i, buf, off, n, packed, fragment)
		case ipsec.AH:
			off, n, ok = w.sealAH(sa, &p, i, buf, off, n, fragment)
		default:
			// UDP is for the way to the peer, so it is outermost.
			if sa.P.Encap != nil && k != b.n-1 {
				w.n.inc(DropOutSeal)
				return
			}
			off, n, ok = w.sealESP(sa, &p, i, buf, off, n, fragment)
		}
		if !ok {
			return
		}
	}
	j := outJob{sealed: true, pkt: wire.Packet{Buf: buf, Off: off, Len: n}, fragment: fragment}
	w.keepLink(&j, b.tunnels())
	w.push(j, esp.Packet{})
}

// putPacked puts an IPComp header and packed in the place of the payload, which is
// longer, and returns where the packet ends then.
func (p *plan) putPacked(cpi uint16, buf, packed []byte) int {
	ipcomp.Put(buf[p.payload:], p.next, cpi)
	p.plen, p.next = ipcomp.HeaderLen+copy(buf[p.payload+ipcomp.HeaderLen:], packed), protoIPComp
	return p.payload + p.plen
}

// sealESP is encapsulate without the batch.
func (w *outWorker) sealESP(sa *sad.SA, p *plan, i *packet.Info, buf []byte, off, n, fragment int) (int, int, bool) {
	seq, ok := sa.NextSeq(1)
	if !ok {
		w.n.inc(DropOutSequence)
		return 0, 0, false
	}
	p.sizeESP(sa)
	one := w.bundler.esp[:]
	var j outJob
	w.putESP(&j, &one[0], sa, p, i, buf, off, n, fragment)
	one[0].Seq = seq
	sa.T.Seal(w.scratch, one)
	err := one[0].Err
	one[0] = esp.Packet{}
	if err != nil {
		w.n.inc(DropOutSeal)
		return 0, 0, false
	}
	if j.udpSum {
		packet.PutUDPChecksum(buf[j.pkt.Off : j.pkt.Off+j.pkt.Len])
	}
	return j.pkt.Off, j.pkt.Len, true
}

// sealAH puts AH in front of the payload (RFC 4302, 3.1) and computes its ICV.
func (w *outWorker) sealAH(sa *sad.SA, p *plan, i *packet.Info, buf []byte, off, n, fragment int) (int, int, bool) {
	v6 := i.Version == 6
	if p.tunnel {
		v6 = sa.P.Dst.Is6()
	}
	fixed := p.hdr + sa.AH.HeaderLen(v6)
	start := p.payload - fixed
	out := buf[start : off+n]
	w.putIP(out, sa, p, i, buf[off:p.payload], protoAH, fragment)
	for ah.Identify(out) {
		w.ipid++
		binary.BigEndian.PutUint16(out[4:], w.ipid)
	}
	seq, ok := sa.NextSeq(1)
	if !ok {
		w.n.inc(DropOutSequence)
		return 0, 0, false
	}
	one := w.bundler.ah[:]
	one[0] = ah.Packet{IP: out, Off: p.hdr, Next: p.next, Seq: seq}
	sa.AH.Seal(&w.bundler.ahs, one)
	err := one[0].Err
	one[0] = ah.Packet{}
	if err != nil {
		w.n.inc(DropOutSeal)
		return 0, 0, false
	}
	packet.FixIPv4Checksum(out)
	return start, len(out), true
}

// putIPComp puts the compressed payload in the place of the payload, behind an
// IPComp header. In tunnel mode a payload that was not compressed becomes IP in
// IP.
func (w *outWorker) putIPComp(sa *sad.SA, p *plan, i *packet.Info, buf []byte, off, n, packed, fragment int) (int, int) {
	start := p.payload - p.hdr
	if packed == unpacked {
		out := buf[start : off+n]
		w.putIP(out, sa, p, i, nil, p.next, fragment)
		packet.FixIPv4Checksum(out)
		return start, len(out)
	}
	out := buf[start : p.payload+ipcomp.HeaderLen+packed]
	w.putIP(out, sa, p, i, buf[off:p.payload], protoIPComp, fragment)
	ipcomp.Put(out[p.hdr:], p.next, uint16(sa.P.SPI))
	copy(out[p.hdr+ipcomp.HeaderLen:], w.bundler.packed[:packed])
	packet.FixIPv4Checksum(out)
	return start, len(out)
}

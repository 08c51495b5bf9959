package keyengine

import (
	"maps"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// maxSeq is the largest of an ACQUIRE: above are those that keysock's clients make
// up for requests that answer none.
const maxSeq = 1<<31 - 1

// pending is an SA that was asked for. There is one per SA, whatever the
// traffic; it ends with an SA that fits, with a failure report, or after
// LarvalLife. failed: it has ended badly, and stays for FailureHold as a brake.
type pending struct {
	key    wanted
	policy *spd.Entry
	flow   ipsec.Flow // the first packet's
	seq    uint32     // 0: not asked yet
	failed bool
	manual bool // an SA without reqid may serve
	other  bool // an SA of another protocol may serve
	since  time.Time
	timer  timer
}

// wanted is an SA that somebody lacks. The flow is set where every flow has SAs
// of its own.
type wanted struct {
	sad.OutKey
	flow ipsec.Flow
}

// NeedSA is called by the data path for a packet of flow f that met the policy
// p and found no SA for key. It costs little to call it again and again. Any
// goroutine.
func (e *Engine) NeedSA(p *spd.Entry, key sad.OutKey, f ipsec.Flow) {
	want := wanted{OutKey: key}
	if p.P.Flags&ipsec.PolicyPerFlow != 0 {
		want.flow = f
	}
	e.mu.Lock()
	known := e.asked[want]
	full := !known && len(e.asked) >= MaxPending
	switch {
	case full:
		e.refused++
	case !known:
		e.asked[want] = true
	}
	e.mu.Unlock()
	if known || full {
		return
	}
	e.srv.Do(func() {
		e.acquire(p, want, f)
		e.arm()
	})
}

// acquire asks the key daemons for an SA.
func (e *Engine) acquire(p *spd.Entry, key wanted, f ipsec.Flow) {
	if e.pending[key] != nil {
		return
	}
	w := &pending{key: key, policy: p, flow: f, since: e.o.Now()}
	w.timer.fire = func(now time.Time) { e.timeout(w, now) }
	e.ask(w, 0)
}

// ask asks all key daemons for w, or that of one connection.
func (e *Engine) ask(w *pending, conn uint64) {
	p, key := w.policy, w.key
	var r *ipsec.Request
	for i := range p.P.Requests {
		q := &p.P.Requests[i]
		if q.Proto == key.Proto && q.Mode == key.Mode && (key.ReqID == 0 || q.ReqID == key.ReqID) &&
			(q.Mode != ipsec.Tunnel || q.Src == key.Src && q.Dst == key.Dst) {
			r = q
			break
		}
	}
	if e.o.SPD.Edit().Get(p.P.ID) != p || r == nil {
		e.done(w) // policy gone meanwhile
		e.fail(key.OutKey)
		return
	}
	// Where only whole alternatives count, the SA that is there may be of another.
	if sa := e.o.SAD.Out(key.OutKey, nil); sa != nil && sa.P.Queue == key.Queue && p.Choices == nil && len(sa.P.SrcTS) == 0 && len(sa.P.DstTS) == 0 {
		e.done(w) // an SA for any packet came meanwhile
		e.installed(key.OutKey)
		return
	}
	if w.seq == 0 {
		for e.seq++; e.seq == 0 || e.seq > maxSeq || e.bySeq[e.seq] != nil; e.seq++ {
		}
		w.seq = e.seq
	}
	offer := e.offer(p, r, key.OutKey, w.flow)
	w.manual, w.other = p.P.Flags&ipsec.PolicyManual != 0, false
	for i := range offer {
		w.other = w.other || !offer[i].Shape.Has(key.Proto)
	}
	e.mu.Lock()
	e.pending[key] = w
	e.mu.Unlock()
	e.bySeq[w.seq] = w
	ok := e.srv.Acquire(keysock.Acquire{
		Seq: w.seq, Proto: key.Proto, Src: key.Src, Dst: key.Dst, PolicyID: p.P.ID, Priority: p.P.Priority,
		Mode: key.Mode, ReqID: r.ReqID, Proposals: offer, Flow: &w.flow, Queue: key.Queue,
	}, conn)
	switch now := e.o.Now(); {
	case !ok: // nobody registered
		e.failed(w, now)
	case conn == 0:
		w.failed, w.since = false, now
		e.timers.set(&w.timer, now.Add(LarvalLife))
	}
}

// Registered implements keysock.Audience: who registers hears what is being asked
// for, as if it had been there before. RFC 2367 does not say what becomes of an
// ACQUIRE whose key daemon goes without an answer, and Linux lets it expire: the next
// daemon would hear of it after LarvalLife only, and packets wait for so long, or are
// dropped. Nor does the brake hold for somebody who has not said no: what failed is
// asked of all again. A socket hears of an ACQUIRE once for each socket that comes, at
// most; its time runs on, and so daemons that come and go hold up nothing.
//
// What GETSPI made for the one that is gone stays for LarvalLife, as all SAs outlive
// their makers: another socket may have been meant to complete it, and it is in
// nobody's way.
func (e *Engine) Registered(conn uint64) {
	defer e.arm()
	for _, w := range slices.SortedFunc(maps.Values(e.pending), func(a, b *pending) int { return a.since.Compare(b.since) }) {
		if w.failed {
			w.seq = 0
			e.ask(w, 0)
		} else {
			e.ask(w, conn)
		}
	}
}

// offer is what key daemons may choose from for the SA of request r, wanted by
// key. If all alternatives have the same transforms, or the SA of the other
// transform is there already, that is what they say of r's protocol. Else it is
// all of them: which one is made has yet to be found out. f is the packet.
func (e *Engine) offer(p *spd.Entry, r *ipsec.Request, key sad.OutKey, f ipsec.Flow) []ipsec.Proposal {
	parts := ipsec.Parts(p.P.Proposals, r.Proto)
	mixed := slices.ContainsFunc(p.P.Proposals, func(a ipsec.Proposal) bool { return a.Shape != p.P.Proposals[0].Shape })
	if p.Choices == nil {
		return parts
	}
	for i := range p.P.Requests {
		o := &p.P.Requests[i]
		if o.Proto == r.Proto {
			continue
		}
		key.Proto, key.ReqID = o.Proto, o.ReqID
		sa := e.o.SAD.Out(key, infoOf(f))
		if sa == nil {
			continue
		}
		var l []ipsec.Proposal
		for k := range p.P.Proposals {
			if a := p.P.Proposals[k : k+1]; a[0].Shape == ipsec.ShapeAHESP && sa.Fits(a) {
				l = append(l, ipsec.Parts(a, r.Proto)...)
			}
		}
		if len(l) > 0 {
			return l
		}
	}
	if mixed {
		return slices.Clone(p.P.Proposals)
	}
	return parts
}

// infoOf is what the SAD looks at in a packet of flow f.
func infoOf(f ipsec.Flow) *packet.Info {
	i := &packet.Info{Version: 4, Src: f.Src, Dst: f.Dst, Proto: f.Proto, SrcPort: f.SrcPort, DstPort: f.DstPort}
	if f.Dst.Is6() {
		i.Version = 6
	}
	i.HasPorts = f.SrcPort|f.DstPort != 0 || packet.IsICMP(f.Proto)
	return i
}

// answered ends the ACQUIREs that SA r answers: the one of seq, if protocol
// and destination agree, and those of its key.
func (e *Engine) answered(r *record, seq uint32) {
	p := &r.sa.P
	ends := p.Ends()
	key := sad.OutKey{Proto: p.Proto, Mode: p.Mode, ReqID: p.ReqID, Src: ends.Src, Dst: ends.Dst, Queue: p.Queue}
	any := key
	any.ReqID = 0
	keys := []sad.OutKey{key}
	if any != key {
		keys = append(keys, any)
	}
	if w := e.bySeq[seq]; seq != 0 && w != nil && (w.key.Proto == p.Proto || w.other) && w.key.Dst == ends.Dst {
		e.done(w)
		if !slices.Contains(keys, w.key.OutKey) {
			keys = append(keys, w.key.OutKey)
		}
	}
	for _, w := range e.pending {
		k := w.key.OutKey
		if key.ReqID == 0 && w.manual {
			k.ReqID = 0
		}
		if k != key && k != any && !packs(p, k) && !(k.Open() && k.Takes(p)) || w.key.flow != (ipsec.Flow{}) && !holds(p, w.key.flow) {
			continue
		}
		e.done(w)
		if !slices.Contains(keys, w.key.OutKey) {
			keys = append(keys, w.key.OutKey)
		}
	}
	for _, k := range keys {
		e.installed(k)
	}
}

// packs: key is one of the two SAs that p, which has IPComp inside, stands for
// (ipsec.Packed).
func packs(p *ipsec.SAParams, key sad.OutKey) bool {
	if ends := p.Ends(); p.CPI == 0 || key.Src != ends.Src || key.Dst != ends.Dst {
		return false
	}
	if key.Proto == ipsec.IPComp {
		return key.Mode == p.Mode
	}
	return key.Proto == p.Proto && key.Mode == ipsec.Transport && (key.ReqID == 0 || key.ReqID == p.ReqID)
}

// holds reports whether an SA with the selectors of p may carry a flow.
func holds(p *ipsec.SAParams, f ipsec.Flow) bool {
	src, dst := f.SrcPort, f.DstPort
	if packet.IsICMP(f.Proto) {
		src = f.SrcPort<<8 | f.DstPort
		dst = src
	}
	in := func(l []ipsec.TrafficSelector, a netip.Addr, port uint16) bool {
		return len(l) == 0 || slices.ContainsFunc(l, func(t ipsec.TrafficSelector) bool { return t.Contains(a, f.Proto, port, true) })
	}
	return in(p.SrcTS, f.Src, src) && in(p.DstTS, f.Dst, dst)
}

// AcquireFailed implements keysock.Backend.
func (e *Engine) AcquireFailed(seq uint32, _ syscall.Errno) {
	defer e.arm()
	if w := e.bySeq[seq]; seq != 0 && w != nil && !w.failed {
		e.failed(w, e.o.Now())
	}
}

// timeout: nobody answered, or a failure is old enough.
func (e *Engine) timeout(w *pending, _ time.Time) {
	e.done(w)
	if w.failed {
		return
	}
	e.fail(w.key.OutKey)
	// As Linux: the SA that was wanted, with SPI 0, has expired.
	e.srv.Expire(&keysock.SAInfo{
		SAParams: ipsec.SAParams{
			SAID: ipsec.SAID{Proto: w.key.Proto, Dst: w.key.Dst}, Src: w.key.Src, Mode: w.key.Mode, ReqID: w.key.ReqID,
			Hard: ipsec.Lifetime{AddTime: LarvalLife},
		},
		State: keysock.Dead, Seq: w.seq, Added: w.since,
	}, true)
}

// failed drops the packets that wait for w and starts the brake.
func (e *Engine) failed(w *pending, now time.Time) {
	w.failed = true
	delete(e.bySeq, w.seq)
	e.timers.set(&w.timer, now.Add(FailureHold))
	e.fail(w.key.OutKey)
}

// done forgets w.
func (e *Engine) done(w *pending) {
	e.timers.stop(&w.timer)
	e.mu.Lock()
	delete(e.pending, w.key)
	e.mu.Unlock()
	delete(e.bySeq, w.seq)
	e.forget(w.key)
}

func (e *Engine) forget(key wanted) {
	e.mu.Lock()
	delete(e.asked, key)
	e.mu.Unlock()
}

func (e *Engine) installed(key sad.OutKey) {
	if e.o.Installed != nil {
		e.o.Installed(key)
	}
}

func (e *Engine) fail(key sad.OutKey) {
	if e.o.Failed != nil {
		e.o.Failed(key)
	}
}

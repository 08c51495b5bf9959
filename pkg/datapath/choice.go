package datapath

import (
	"time"

	"github.com/missiu/missiu/pkg/datapath/flow"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/ipsec"
)

// choose protects a packet by the first alternative of p for each of whose
// transforms there is an SA with its algorithms. Without one it waits, and asks
// for what the first alternative lacks that has an SA already, else for the
// innermost SA of the first: key daemons then say which alternative it is.
func (w *outWorker) choose(p *spd.Entry, buf []byte, off, n int, now time.Time, whole bool) {
	if w.known != nil && w.known.State() == sad.Mature {
		w.encapsulate(w.known, buf, off, n, now, whole)
		return
	}
	var b bundle
	k, lacks := w.complete(p, &b)
	if k >= 0 {
		if b.n == 1 && b.sas[0].P.Proto == ipsec.ESP {
			if b.sas[0].State() == sad.Mature {
				w.flows.Put(&w.info, 0, w.gen, flow.Decision{Policy: p, SA: b.sas[0]})
			}
			w.encapsulate(b.sas[0], buf, off, n, now, whole)
			return
		}
		dst := w.info.Dst
		if b.sas[0].P.Mode == ipsec.Tunnel {
			dst = b.sas[0].P.Dst
		}
		w.transform(&b, dst, buf, off, n, now, whole)
		return
	}
	nobody := p.P.Requests[0].AnyPeer()
	if p.P.Flags&ipsec.PolicyClear != 0 {
		if !nobody {
			w.e.c.NeedSA(p, lacks, w.info.Flow())
		}
		w.pass(buf, off, n, whole)
		return
	}
	if nobody {
		w.n.inc(DropOutNoPeer)
		return
	}
	keys := []sad.OutKey{lacks}
	for i := range p.P.Requests {
		if key := outKey(&p.P.Requests[i], w.info.Src, w.info.Dst); key != lacks {
			keys = append(keys, key)
		}
	}
	ask, ok, full := w.e.hold.put(p.P.ID, keys, true, buf[off:off+n], w.link.b[:w.link.n], whole, now)
	w.held(ok, full)
	if len(ask) > 0 || p.P.Flags&ipsec.PolicyPerFlow != 0 {
		w.e.c.NeedSA(p, lacks, w.info.Flow())
	}
	// SAs may have come between the look-up and the put.
	if k, _ := w.complete(p, &b); k >= 0 {
		w.e.Installed(lacks)
	}
}

// complete is the first alternative of p that has all its SAs, which go into b;
// -1 if none has. Then lacks is the SA to ask for.
func (w *outWorker) complete(p *spd.Entry, b *bundle) (k int, lacks sad.OutKey) {
	partial := false
	for k := range p.Choices {
		c := &p.Choices[k]
		var missing sad.OutKey
		b.n = 0
		for i := range c.Requests {
			key := outKey(&c.Requests[i], w.info.Src, w.info.Dst)
			if b.n > 0 && key.Mode == ipsec.Tunnel { // perhaps open: of the same peer
				ends := b.sas[0].P.Ends()
				key.Src, key.Dst = ends.Src, ends.Dst
			}
			sa := w.e.c.SAD.Out(key, &w.info)
			if (sa == nil || !sa.Fits(c.Alg)) && p.P.Flags&ipsec.PolicyManual != 0 {
				sa = w.e.c.SAD.OutManual(key, &w.info, c.Alg)
			}
			switch {
			case sa != nil && sa.Fits(c.Alg):
				b.sas[b.n] = sa
				b.n++
			case missing == sad.OutKey{}:
				missing = key
			}
		}
		switch {
		case b.n == len(c.Requests):
			return k, sad.OutKey{}
		case k == 0, b.n > 0 && !partial:
			lacks, partial = missing, b.n > 0
		}
	}
	return -1, lacks
}

package ike

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
	"go.uber.org/zap"
)

// What a lineage does to the SAs of its children in missiu: their outputs carried out.

// getSPI gets an SPI for one protocol, and the same one for the others. That is
// there already, in one of four thousand million cases: then another is tried.
func (l *lineage) getSPI(o sa.NeedSPI) (spi ipsec.SPI, err error) {
	get := func(f sa.SPIFor, spi ipsec.SPI) (ipsec.SPI, error) {
		g := keysock.GetSPI{Proto: f.Proto, Src: o.Src, Dst: o.Dst, Mode: o.Mode, ReqID: f.ReqID, Seq: o.Seq, Min: spi, Max: spi, Queue: o.Queue}
		if f.Proto == ipsec.ESP {
			g.Encap = o.Encap
		}
		err := l.d.keys(func(ctx context.Context, k KeySocket) (err error) {
			spi, err = k.GetSPI(ctx, g)
			return err
		})
		return spi, err
	}
	for range spiTries {
		spi, err = 0, nil
		for i, f := range o.For {
			if spi, err = get(f, spi); err == nil {
				continue
			}
			for _, had := range o.For[:i] {
				l.d.removeSA(installed{ipsec.SAID{Proto: had.Proto, Dst: o.Dst, SPI: spi}, netip.Addr{}})
			}
			break
		}
		if !errors.Is(err, syscall.EEXIST) {
			break
		}
	}
	if err != nil {
		l.log.Error("no SPI", zap.Stringer("peer", o.Src), zap.Error(err))
	}
	return spi, err
}

// install puts both SAs of a child SA in force, or neither; the outbound one
// perhaps later. asked: it was asked for here.
func (l *lineage) install(o sa.InstallChild) (asked bool, err error) {
	defer o.In.Wipe()
	l.d.tellESP(o.In)
	in := installed{o.In.SAID, o.In.Src}
	l.register(in)
	l.d.mu.Lock()
	was := len(l.pending)
	waits := l.take(o.Seq, policyID(o.Policy), o.In.Proto)
	asked = len(l.pending) < was
	l.d.mu.Unlock()
	defer func() { endAll(waits.tickets, err) }()
	err = l.d.keys(func(ctx context.Context, k KeySocket) error { return k.Update(ctx, o.In, o.Seq) })
	if err == nil && o.Out != nil {
		err = l.installOut(o.Out, o.Seq)
	}
	if err != nil {
		l.drop(in)
		return asked, err
	}
	l.children[in.id] = childCount{src: in.src, policy: policyID(o.Policy)}
	l.d.mu.Lock()
	l.has[acquireKey{policy: policyID(o.Policy), proto: o.In.Proto}]++
	l.d.mu.Unlock()
	l.log.Debug("child SA installed", zap.Stringer("proto", o.In.Proto), zap.Stringer("spi_in", o.In.SPI), zap.Bool("out", o.Out != nil),
		zap.Stringer("peer", o.In.Src), zap.Stringer("mode", o.In.Mode), zap.String("suite", suiteOf(o.In)),
		zap.Bool("udp", o.In.Encap != nil), zap.Uint32("policy", policyID(o.Policy)), zap.Uint32("seq", o.Seq))
	return asked, nil
}

// serves reports whether there is an SA of a policy and protocol.
func (l *lineage) serves(policy uint32, proto ipsec.Protocol) bool {
	for id, c := range l.children {
		if c.policy == policy && id.Proto == proto {
			return true
		}
	}
	return false
}

// rest is what to ask for behind an SA that is not enough for its policy. What
// an ACQUIRE asked for is followed by another one, and where it is clear from the
// beginning what the policy needs all was asked for at once.
func (l *lineage) rest(o sa.InstallChild, asked bool) (sa.ChildRequest, bool) {
	if len(o.Lacks) == 0 || o.Rekeys != 0 {
		return sa.ChildRequest{}, false
	}
	other := ipsec.AH + ipsec.ESP - o.In.Proto
	if l.serves(o.Policy.Out.ID, other) {
		return sa.ChildRequest{}, false
	}
	l.lone = append(l.lone, lone{time.Now().Add(restWait), o.In.SAID, o.Policy.Out, other})
	r := sa.ChildRequest{Policy: o.Policy, Proposals: o.Lacks}
	if !asked || o.Seq != 0 || !o.Policy.Out.Choice() {
		return r, false
	}
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	if l.pending[keyOf(r)] != nil {
		return r, false
	}
	l.pending[keyOf(r)] = &pendingChild{}
	return r, true
}

// missOthers tells of SAs without the other one that their policy wants, which
// should have come by now; false: there was none to look at.
func (l *lineage) missOthers(now time.Time) (looked bool) {
	for len(l.lone) > 0 && !l.lone[0].at.After(now) {
		x := l.lone[0]
		l.lone = l.lone[1:]
		looked = true
		if _, up := l.children[x.in]; !up || l.serves(x.policy.ID, x.lacks) {
			continue
		}
		l.log.Warn("the peer has made one SA of two that the policy wants: nothing passes", zap.Stringer("peer", l.remote), zap.String("rule", l.rule()),
			zap.Uint32("policy", x.policy.ID), zap.Stringer("src", x.policy.Sel.Src), zap.Stringer("dst", x.policy.Sel.Dst),
			zap.Stringer("has", x.in), zap.Stringer("lacks", x.lacks))
	}
	return looked
}

// installOut puts an outbound SA in force.
func (l *lineage) installOut(p *ipsec.SAParams, seq uint32) error {
	defer p.Wipe()
	l.d.tellESP(p)
	out := installed{p.SAID, p.Src}
	l.register(out)
	err := l.d.keys(func(ctx context.Context, k KeySocket) error { return k.Add(ctx, p, seq) })
	if err != nil {
		l.drop(out)
		return err
	}
	l.log.Debug("outbound SA installed", zap.Stringer("sa", p.SAID))
	return nil
}

// register says that an SA is of this lineage; before it is installed, since an
// EXPIRE may follow at once.
func (l *lineage) register(i installed) {
	if err := l.d.cfg.Journal.add(i); err != nil && l.d.journalFailed.CompareAndSwap(false, true) {
		l.log.Error("journal of SAs not written: what is left after a crash will not be removed", zap.Error(err))
	}
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	l.d.bySA[i.id] = l
	l.sas[i.id] = i.src
}

func suiteOf(p *ipsec.SAParams) string {
	s := p.Encr.String()
	if p.Proto == ipsec.AH {
		s = "ah"
	}
	if bits := (p.EncrKey.Len() - p.Encr.Info().SaltLen) * 8; bits > 0 {
		s += "-" + strconv.Itoa(bits)
	}
	if p.Auth != 0 {
		s += "/" + p.Auth.String()
	}
	if p.ESN {
		s += "/esn"
	}
	return s
}

// drop removes an SA from the tables and from missiu.
func (l *lineage) drop(i installed) {
	l.d.mu.Lock()
	if l.d.bySA[i.id] == l {
		delete(l.d.bySA, i.id)
	}
	delete(l.sas, i.id)
	l.forgetMove(i.id)
	if c, ok := l.children[i.id]; ok {
		l.has[acquireKey{policy: c.policy, proto: i.id.Proto}]--
	}
	l.d.mu.Unlock()
	delete(l.children, i.id)
	l.d.removeSA(i)
}

func (l *lineage) remove(o sa.RemoveChild) {
	if o.In.SPI != 0 {
		l.rekeyed(rekeyKey(o.In.SPI), o.Reason)
	}
	for _, i := range []installed{{o.Out, o.OutSrc}, {o.In, o.InSrc}} {
		if i.id.SPI != 0 {
			l.drop(i)
			l.log.Debug("SA removed", zap.Stringer("sa", i.id), zap.NamedError("reason", o.Reason))
		}
	}
}

// moveSAs gives SAs the port, and those that go with it the address, that the
// peer's NAT has now.
func (l *lineage) moveSAs(o sa.PeerMoved) (outs []sa.Output) {
	l.d.mu.Lock()
	sas := make([]installed, 0, len(l.sas))
	for id, src := range l.sas {
		switch {
		case o.Old.Addr() == o.New.Addr() && (id.Dst == o.Old.Addr() || src == o.Old.Addr()), slices.Contains(o.Moved, id):
			sas = append(sas, installed{id, src})
		}
	}
	l.d.mu.Unlock()
	for _, i := range sas {
		to, err := l.moveSA(i, o)
		if err != nil {
			l.log.Warn("SA did not follow the peer", zap.Stringer("sa", i.id), zap.Error(err))
			if len(o.Moved) > 0 {
				outs = append(outs, l.sa.ChildLost(time.Now(), to, err)...)
			}
		}
	}
	return outs
}

// moveSA moves one SA and returns its name at the new place.
func (l *lineage) moveSA(i installed, o sa.PeerMoved) (to ipsec.SAID, err error) {
	to, src := i.id, i.src
	if out := i.id.Dst == o.Old.Addr(); out {
		to.Dst = o.New.Addr()
	} else {
		src = o.New.Addr()
	}
	return to, l.relocate(i, to, src, func(ctx context.Context, k KeySocket, p *ipsec.SAParams) error {
		if p.Encap != nil {
			e := *p.Encap
			if i.src == o.Old.Addr() {
				e.SPort = o.New.Port()
			} else {
				e.DPort = o.New.Port()
			}
			p.Encap = &e
		}
		if to == i.id && src == i.src {
			if p.Encap == nil {
				return nil
			}
			return k.Update(ctx, p, 0)
		}
		p.SAID, p.Src = to, src
		return k.Move(ctx, i.id, p)
	})
}

func (l *lineage) childFailed(o sa.ChildFailed) {
	l.log.Debug("child SA failed", zap.Stringer("peer", l.remote), zap.Uint32("policy", policyID(o.Policy)), zap.Uint32("seq", o.Seq), zap.Error(o.Err))
	l.d.mu.Lock()
	p := l.take(o.Seq, policyID(o.Policy), ipsec.ESP)
	l.d.noteFailure(l.label, o.Err)
	l.d.mu.Unlock()
	p.fail(l.d, o.Err)
}

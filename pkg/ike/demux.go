package ike

import (
	"encoding/binary"
	"errors"
	"hash/maphash"
	"net/netip"
	"time"

	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/proto/ikev2"
	"github.com/missiu/missiu/proto/isakmp"
	"go.uber.org/zap"
)

// demux hands a datagram to the lineage that it is for, or decides about a
// stranger's. Nothing in it is believed yet.
func (d *Daemon) demux(dg sa.Datagram) {
	h, _, err := ikev2.ParseHeader(dg.Data)
	if err != nil {
		d.badHeader(dg, h, err)
		return
	}
	// The Initiator flag is that of the sender; the other SPI is ours
	// (RFC 7296, 3.1).
	own := h.ResponderSPI
	if !h.FromInitiator() {
		own = h.InitiatorSPI
	}
	isInit := own == 0 && h.Exchange == ikev2.IKE_SA_INIT && h.FromInitiator() && !h.IsResponse() && h.MessageID == 0 && h.InitiatorSPI != 0
	var first initKey
	if isInit {
		first = d.initKey(dg)
	}
	d.mu.Lock()
	l := d.bySPI[own]
	if isInit {
		l = d.byInit[first]
	}
	d.mu.Unlock()
	switch {
	case l != nil:
		if !l.deliver(dg) {
			d.counters.full.Add(1)
		}
	case isInit:
		d.stranger(dg, h, first)
	default:
		d.unknownSPI(dg, h)
	}
}

// initKey knows an IKE_SA_INIT request again, by its octets and where it comes from.
// The initiator's SPI does not: others may have the same, by accident or to have an
// honest one taken for a repetition of theirs (RFC 7296, 2.1).
type initKey uint64

func (d *Daemon) initKey(dg sa.Datagram) initKey {
	var h maphash.Hash
	h.SetSeed(d.seed)
	a := dg.Remote.Addr().As16()
	h.Write(a[:])
	h.Write(binary.BigEndian.AppendUint16(nil, dg.Remote.Port()))
	h.Write(dg.Data)
	return initKey(h.Sum64())
}

// stranger decides about an IKE_SA_INIT request of nobody we know (RFC 7296, 2.6),
// whose key is first.
func (d *Daemon) stranger(dg sa.Datagram, h ikev2.Header, first initKey) {
	m, err := ikev2.Parse(dg.Data)
	if err != nil {
		d.counters.malformed.Add(1)
		d.log.Debug("malformed IKE_SA_INIT", zap.Stringer("peer", dg.Remote), zap.Error(err))
		return
	}
	from := originOf(dg.Remote.Addr(), d.budget.needCookie(dg.Remote.Addr()))
	if from.cookie && !d.hasCookie(dg, m) {
		return
	}
	candidates := d.rules.Load().Inbound(dg.Local.Addr(), dg.Remote.Addr())
	if len(candidates) == 0 {
		d.counters.refused.Add(1)
		if log := d.about(dg.Remote.Addr()); log != nil {
			logMessage(log, "received", h, dg.Remote, len(dg.Data), "")
			log.Info("no rule for this peer", zap.Stringer("peer", dg.Remote), zap.Stringer("local", dg.Local))
		}
		d.answer(dg, h, ikev2.NO_PROPOSAL_CHOSEN, nil)
		return
	}
	if !d.budget.take(from) {
		d.counters.refused.Add(1)
		if log := d.about(dg.Remote.Addr()); log != nil {
			log.Warn("too many half-open IKE SAs", zap.Stringer("peer", dg.Remote), zap.Int("half_open", d.budget.halfOpen()))
		}
		return
	}
	l := d.newLineage(dg.Local, dg.Remote, false)
	l.sa = sa.NewResponder(l.config(false), candidates)
	l.halfOpen, l.init, l.origin = true, first, from
	if !d.start(l, func(l *lineage, now time.Time) []sa.Output { return l.sa.Receive(now, dg) }) {
		d.budget.give(from)
	}
}

// hasCookie reports whether m brings a good cookie; else it demands one.
// Nothing is kept meanwhile.
func (d *Daemon) hasCookie(dg sa.Datagram, m *ikev2.Message) bool {
	secrets, err := d.secrets.get(time.Now())
	if err != nil {
		d.log.Error("random source", zap.Error(err))
		return false
	}
	for _, s := range secrets {
		if s.key != nil && sa.CheckCookie(s.key, s.version, dg.Remote, m) {
			return true
		}
	}
	cookie, ok := sa.Cookie(secrets[0].key, secrets[0].version, dg.Remote, m)
	if !ok {
		d.counters.malformed.Add(1)
		return false
	}
	b, err := sa.CookieResponse(m, cookie)
	if err != nil {
		d.log.Error("cookie", zap.Error(err))
		return false
	}
	// Under a flood a log line each would be an attack of its own.
	d.counters.cookies.Add(1)
	d.log.Debug("cookie demanded", zap.Stringer("peer", dg.Remote))
	if err := d.send(b, dg.Local, dg.Remote); err != nil {
		d.log.Debug("cookie", zap.Error(err))
	}
	return false
}

// badHeader deals with what is no IKEv2 message.
func (d *Daemon) badHeader(dg sa.Datagram, h ikev2.Header, err error) {
	if !errors.Is(err, ikev2.ErrVersion) {
		d.counters.malformed.Add(1)
		d.log.Debug("malformed message", zap.Stringer("peer", dg.Remote), zap.Error(err))
		return
	}
	d.counters.version.Add(1)
	d.log.Debug("message of another version", zap.Stringer("peer", dg.Remote), zap.Error(err))
	// A higher version is told ours (RFC 7296, 2.5); IKEv1 would not understand.
	if ih, _, err := isakmp.Parse(dg.Data); err == nil && ih.Major > 2 && !h.IsResponse() {
		d.answer(dg, h, ikev2.INVALID_MAJOR_VERSION, nil)
	}
}

// unknownSPI answers a request for an IKE SA that we do not have, so that the
// peer may find out that we have restarted (RFC 7296, 2.21.4).
func (d *Daemon) unknownSPI(dg sa.Datagram, h ikev2.Header) {
	d.counters.unknownSPI.Add(1)
	d.log.Debug("unknown IKE SA", zap.Stringer("peer", dg.Remote), zap.Stringer("spi_i", h.InitiatorSPI),
		zap.Stringer("spi_r", h.ResponderSPI), zap.Stringer("exchange", h.Exchange))
	if !h.IsResponse() && h.Exchange != ikev2.IKE_SA_INIT && h.InitiatorSPI != 0 && h.ResponderSPI != 0 {
		d.answer(dg, h, ikev2.INVALID_IKE_SPI, nil)
	}
}

// answer sends an unprotected notify in response to a request, at a limited rate.
// It has eight octets more than the shortest request, a mere header: whoever forges
// its source gains nothing by it.
func (d *Daemon) answer(dg sa.Datagram, h ikev2.Header, n ikev2.NotifyType, data []byte) {
	if !d.answers.allow(time.Now()) {
		return
	}
	h.Flags = ^h.Flags&ikev2.FlagInitiator | ikev2.FlagResponse // reserved bits are clear (RFC 7296, 3.1)
	h.Minor = 0
	m := &ikev2.Message{Header: h, Payloads: []ikev2.Payload{&ikev2.Notify{Type: n, Data: data}}}
	b, err := m.Append(nil)
	if err != nil {
		return
	}
	if log := d.about(dg.Remote.Addr()); log != nil {
		logMessage(log, "sent", h, dg.Remote, len(b), "", zap.Stringer("notify", n))
	}
	if err := d.send(b, dg.Local, dg.Remote); err != nil {
		d.log.Debug("send", zap.Error(err))
	}
}

// about gives the log for lines about a stranger; nil: there are too many.
func (d *Daemon) about(source netip.Addr) *zap.Logger { return d.limited(&d.lines, source) }

func (d *Daemon) limited(l *lines, source netip.Addr) *zap.Logger {
	left, ok := l.allow(source, time.Now())
	switch {
	case !ok:
		return nil
	case left > 0:
		d.log.Warn("lines were left out of the log", zap.Uint64("count", left))
	}
	return d.log
}

// logMessage writes the line of a message. Its keys are those of the machine's
// own lines.
func logMessage(log *zap.Logger, dir string, h ikev2.Header, peer netip.AddrPort, n int, rule string, more ...zap.Field) {
	kind := "request"
	if h.IsResponse() {
		kind = "response"
	}
	log.Info(dir+" "+h.Exchange.String()+" "+kind, append([]zap.Field{
		zap.Stringer("peer", peer), zap.Stringer("spi_i", h.InitiatorSPI), zap.Stringer("spi_r", h.ResponderSPI),
		zap.Uint32("msgid", h.MessageID), zap.Int("bytes", n), zap.String("rule", rule),
	}, more...)...)
}

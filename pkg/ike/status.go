package ike

import (
	"fmt"
	"time"

	"github.com/missiu/missiu/pkg/ike/sa"
	"go.uber.org/zap"
)

// LogStatus logs a line per IKE SA and per child SA, and one of counters. It
// does not wait for the lines to be written.
func (d *Daemon) LogStatus() {
	ls := d.snapshot()
	c := &d.counters
	d.log.Info("status", zap.Int("ike_sas", len(ls)), zap.Int("half_open", d.budget.halfOpen()), zap.Bool("missiu", d.link.Load() != nil),
		zap.Uint64("malformed", c.malformed.Load()), zap.Uint64("other_version", c.version.Load()), zap.Uint64("unknown_spi", c.unknownSPI.Load()),
		zap.Uint64("cookies", c.cookies.Load()), zap.Uint64("refused", c.refused.Load()), zap.Uint64("inbox_full", c.full.Load()),
		zap.Uint64("lines_left_out", d.lines.leftOut()+d.peers.leftOut()))
	for _, l := range ls {
		err := l.post(func(l *lineage, now time.Time) []sa.Output {
			l.logStatus(now)
			return nil
		})
		if err != nil {
			l.log.Warn("status", zap.Stringer("peer", l.remote), zap.Error(err))
		}
	}
}

func (l *lineage) logStatus(now time.Time) {
	s := l.sa.Status()
	rule := ""
	if s.Peer.Rule != nil {
		rule = s.Peer.Rule.Label
	}
	l.log.Info("IKE SA", zap.String("state", fmt.Sprint(s.State)), zap.Stringer("spi_local", s.Local), zap.Stringer("spi_remote", s.Remote),
		zap.Stringer("peer", s.Peer.Remote), zap.Stringer("id", s.Peer.RemoteID), zap.String("rule", rule), zap.Stringer("suite", s.Suite),
		zap.Bool("initiator", s.Initiator), zap.Duration("age", now.Sub(s.Created).Truncate(time.Second)), zap.Int("children", len(s.Children)),
		zap.Any("dropped", s.Counters))
	for _, c := range s.Children {
		l.log.Info("child SA", zap.Stringer("spi_in", c.In), zap.Stringer("spi_out", c.Out), zap.Stringer("mode", c.Mode), zap.Stringer("suite", c.Suite),
			zap.Bool("ipcomp", c.CPIIn != 0), zap.Uint32("reqid", uint32(c.ReqID)), zap.Stringers("local_ts", c.LocalTS), zap.Stringers("peer_ts", c.PeerTS),
			zap.Duration("age", now.Sub(c.Created).Truncate(time.Second)), zap.Bool("deleting", c.Deleting))
	}
}

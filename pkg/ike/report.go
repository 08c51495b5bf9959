package ike

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/missiu/missiu/pkg/ike/control"
	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Report is the document behind `ike status`. Fields are only ever added. Times
// are seconds from now; keys are in it nowhere.
type Report struct {
	Pid      int               `json:"pid"`
	Since    time.Time         `json:"since"`
	Local    []netip.Addr      `json:"local"`
	Missiu   bool              `json:"missiu"` // connected
	HalfOpen int               `json:"half_open"`
	Counters map[string]uint64 `json:"counters"`
	IKESAs   []IKEReport       `json:"ike_sas"`
	Rules    []RuleReport      `json:"rules"`
}

// IKEReport describes an IKE SA. SPIs are hex.
type IKEReport struct {
	Rule      string            `json:"rule"` // "" while it is not known
	State     string            `json:"state"`
	Initiator bool              `json:"initiator"`
	Local     netip.AddrPort    `json:"local"`
	Peer      netip.AddrPort    `json:"peer"`
	LocalID   string            `json:"local_id,omitempty"`
	PeerID    string            `json:"peer_id,omitempty"`
	SPILocal  string            `json:"spi_local"`
	SPIPeer   string            `json:"spi_peer"`
	Suite     string            `json:"suite,omitempty"`
	Age       int64             `json:"age"`
	RekeyIn   *int64            `json:"rekey_in,omitempty"` // absent: never by us
	ExpireIn  *int64            `json:"expire_in,omitempty"`
	NATLocal  bool              `json:"nat_local"`
	NATPeer   bool              `json:"nat_peer"`
	MOBIKE    bool              `json:"mobike"`
	PeerAddrs []netip.Addr      `json:"peer_addresses,omitempty"` // additional ones, by MOBIKE
	Assigned  []netip.Addr      `json:"assigned,omitempty"`       // to us, inside
	Resent    uint64            `json:"retransmissions"`          // requests of ours, in all
	Waiting   int               `json:"transmissions,omitempty"`  // of the request that has no answer yet
	Dropped   map[string]uint64 `json:"dropped,omitempty"`
	Children  []ChildReport     `json:"children"`
}

// ChildReport describes a child SA.
type ChildReport struct {
	Proto    string   `json:"proto"`
	SPIIn    string   `json:"spi_in"`
	SPIOut   string   `json:"spi_out"`
	Mode     string   `json:"mode"`
	Suite    string   `json:"suite"`
	ReqID    uint32   `json:"reqid"`
	Queue    uint16   `json:"queue,omitempty"`  // of missiu's, for which alone it is
	CPIIn    uint16   `json:"cpi_in,omitempty"` // with IPComp inside, by which we receive, the peer receives
	CPIOut   uint16   `json:"cpi_out,omitempty"`
	Policy   uint32   `json:"policy"`
	LocalTS  []string `json:"local_ts"`
	PeerTS   []string `json:"peer_ts"`
	Age      int64    `json:"age"`
	RekeyIn  *int64   `json:"rekey_in,omitempty"` // by age; absent: not by age, or not by us
	ExpireIn *int64   `json:"expire_in,omitempty"`
	Deleting bool     `json:"deleting"`
}

// RuleReport says how a rule of the configuration stands. Failure is why an SA of
// it did not come up, or ended, last; "" once one is up.
type RuleReport struct {
	Label    string     `json:"label"`
	Remote   []string   `json:"remote"`
	Start    string     `json:"start_action"`
	Up       bool       `json:"up"` // an IKE SA is established
	HeldDown bool       `json:"held_down,omitempty"`
	Failure  string     `json:"failure,omitempty"`
	FailedAt *time.Time `json:"failed_at,omitempty"`
}

// reportWait is how long a report waits for a lineage that is busy.
const reportWait = 2 * time.Second

// Report tells the state of the daemon. IKE SAs that do not answer in time, since
// they wait for missiu, are told of in brief.
func (d *Daemon) Report(ctx context.Context) *Report {
	ctx, cancel := context.WithTimeout(ctx, reportWait)
	defer cancel()
	c := &d.counters
	r := &Report{
		Pid: os.Getpid(), Since: d.since, Local: d.cfg.Local, Missiu: d.link.Load() != nil, HalfOpen: d.budget.halfOpen(),
		Counters: map[string]uint64{
			"malformed": c.malformed.Load(), "other_version": c.version.Load(), "unknown_spi": c.unknownSPI.Load(), "cookies": c.cookies.Load(),
			"refused": c.refused.Load(), "inbox_full": c.full.Load(), "lines_left_out": d.lines.leftOut() + d.peers.leftOut(),
		},
		IKESAs: []IKEReport{}, Rules: []RuleReport{},
	}
	ls := d.snapshot()
	got := make(chan IKEReport, len(ls))
	asked := 0
	for _, l := range ls {
		if l.post(func(l *lineage, now time.Time) []sa.Output { got <- l.report(now); return nil }) == nil {
			asked++
		}
	}
	answered := map[string]bool{}
	for range asked {
		select {
		case i := <-got:
			if i.State != "" {
				r.IKESAs = append(r.IKESAs, i)
				answered[i.SPILocal] = true
			}
			continue
		case <-ctx.Done():
		}
		break
	}
	d.mu.Lock()
	if len(answered) < len(ls) {
		for _, l := range ls {
			if n := len(l.spis); n > 0 && !l.over && !slices.ContainsFunc(l.spis, func(s sa.SPI) bool { return answered[s.String()] }) {
				r.IKESAs = append(r.IKESAs, IKEReport{Rule: l.label, State: "busy", Initiator: l.initiator, Local: l.local, Peer: l.remote,
					SPILocal: l.spis[n-1].String(), Children: []ChildReport{}})
			}
		}
	}
	up := map[string]bool{}
	for l := range d.lineages {
		if l.peer != nil && !l.over {
			up[l.label] = true
		}
	}
	for _, rule := range d.rules.Load().Rules() {
		q := RuleReport{Label: rule.Label, Remote: remotes(rule), Start: rule.StartAction.String(), Up: up[rule.Label], HeldDown: d.heldDown[rule.Label]}
		if f, ok := d.failures[rule.Label]; ok {
			q.Failure, q.FailedAt = f.why, &f.at
		}
		r.Rules = append(r.Rules, q)
	}
	d.mu.Unlock()
	slices.SortFunc(r.IKESAs, func(a, b IKEReport) int {
		if n := strings.Compare(a.Rule, b.Rule); n != 0 {
			return n
		}
		return strings.Compare(a.SPILocal, b.SPILocal)
	})
	return r
}

func remotes(r *pad.Rule) (l []string) {
	l = append(l, r.RemoteHosts...)
	for _, rng := range r.Remote {
		l = append(l, rng.String())
	}
	return l
}

// report describes the IKE SA; without State if it is over.
func (l *lineage) report(now time.Time) IKEReport {
	s := l.sa.Status()
	if s.Local == 0 || s.State >= sa.StateDead {
		return IKEReport{}
	}
	in := func(t time.Time) *int64 {
		if t.IsZero() {
			return nil
		}
		n := int64(t.Sub(now) / time.Second)
		return &n
	}
	r := IKEReport{
		Rule: l.rule(), State: s.State.String(), Initiator: s.Initiator, Local: s.Peer.Local, Peer: s.Peer.Remote,
		SPILocal: s.Local.String(), SPIPeer: s.Remote.String(), RekeyIn: in(s.RekeyAt), ExpireIn: in(s.ExpireAt),
		NATLocal: s.NATLocal, NATPeer: s.NATRemote, MOBIKE: s.MOBIKE, PeerAddrs: s.PeerAddrs, Assigned: s.Lease.Addrs(), Resent: s.Resent, Waiting: s.Waiting, Children: []ChildReport{},
	}
	if !s.Created.IsZero() {
		r.Age = int64(now.Sub(s.Created) / time.Second)
	}
	if s.Remote != 0 {
		r.Suite = s.Suite.String()
	}
	if !s.Peer.LocalID.IsZero() {
		r.LocalID = s.Peer.LocalID.String()
	}
	if !s.Peer.RemoteID.IsZero() {
		r.PeerID = s.Peer.RemoteID.String()
	}
	for name, n := range map[string]uint64{"malformed": s.Counters.Malformed, "integrity": s.Counters.Integrity, "message_id": s.Counters.MessageID,
		"unexpected": s.Counters.Unexpected, "retransmits": s.Counters.Retransmits, "fragments": s.Counters.Fragments,
		"surplus_children": s.Counters.Surplus} {
		if n > 0 {
			if r.Dropped == nil {
				r.Dropped = map[string]uint64{}
			}
			r.Dropped[name] = n
		}
	}
	for _, c := range s.Children {
		r.Children = append(r.Children, ChildReport{
			Proto: c.Suite.Proto().String(), SPIIn: c.In.String(), SPIOut: c.Out.String(), Mode: c.Mode.String(), Suite: c.Suite.String(),
			ReqID: uint32(c.ReqID), Queue: uint16(c.Queue), CPIIn: c.CPIIn, CPIOut: c.CPIOut, Policy: policyID(c.Policy), LocalTS: texts(c.LocalTS), PeerTS: texts(c.PeerTS),
			Age: int64(now.Sub(c.Created) / time.Second), RekeyIn: in(c.RekeyAt), ExpireIn: in(c.ExpireAt), Deleting: c.Deleting,
		})
	}
	return r
}

func texts(ts []ipsec.TrafficSelector) []string {
	l := make([]string, len(ts))
	for i, t := range ts {
		l[i] = t.String()
	}
	return l
}

// Control carries out an operator's command; it is a control.Handler.
func (d *Daemon) Control(ctx context.Context, q control.Request) control.Response {
	do := map[string]func(context.Context, string) error{"up": d.Up, "down": d.Down, "rekey": d.Rekey}[q.Do]
	switch {
	case q.Do == "status":
		b, err := json.Marshal(d.Report(ctx))
		if err != nil {
			return control.Response{Error: err.Error()}
		}
		return control.Response{OK: true, Status: b}
	case do == nil:
		return control.Response{Error: fmt.Sprintf("no command %q; want status, up, down or rekey", q.Do)}
	case q.Rule == "":
		return control.Response{Error: q.Do + ": no rule given"}
	}
	if err := do(ctx, q.Rule); err != nil {
		return control.Response{Error: err.Error()}
	}
	return control.Response{OK: true}
}

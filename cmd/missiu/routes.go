package main

import (
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/wire/route"
	"github.com/missiu/missiu/pkg/ipsec"
)

// Values of --routes.
const (
	routesNone = "none" // the operator's business
	routesAuto = "auto" // for policies
	routesSA   = "sa"   // for policies, while they have an SA
)

// A change of policies returns when its routes are in force, unless that takes
// longer than rerouteLimit: then those of further ones come up to reroutePause later.
const (
	rerouteLimit = 20 * time.Millisecond
	reroutePause = 100 * time.Millisecond
)

// routing keeps routes in step with policies and SAs. All but the table belongs
// to the goroutine of keysock.Server.Serve.
type routing struct {
	table *route.Table
	took  time.Duration // the last time
	due   bool          // a later look is queued
	sas   bool          // SAs matter
}

// reroute follows a change of policies, if at once without delay.
func (in *instance) reroute(atOnce bool) {
	r := in.routes
	switch {
	case r == nil || r.due && !atOnce:
	case atOnce || r.took < rerouteLimit:
		in.route()
	default:
		r.due = true
		time.AfterFunc(reroutePause, func() { in.srv.Do(in.route) })
	}
}

// saChanged follows a change of SAs, where that matters, behind the request that made it.
func (in *instance) saChanged() {
	r := in.routes
	if r == nil || !r.sas || r.due {
		return
	}
	r.due = true
	if r.took < rerouteLimit {
		in.srv.Do(in.route)
		return
	}
	time.AfterFunc(reroutePause, func() { in.srv.Do(in.route) })
}

// route makes the routes that policies and SAs want now.
func (in *instance) route() {
	r := in.routes
	r.due = false
	start := time.Now()
	ps := outbound(in.keys.Rules())
	o := route.PlanOptions{PerSA: in.o.routes == routesSA, DropRest: in.o.defaultAction() == ipsec.Discard, Assigned: in.assigned, Awaited: in.awaited}
	for _, p := range in.wire.Link().Addrs {
		o.Outer = append(o.Outer, p.Addr())
	}
	var sas []*ipsec.SAParams
	if r.sas = o.PerSA || anyPeer(ps) || len(in.assigned) > 0; r.sas {
		sas = outboundSAs(in.sad, in.wire.IsLocal)
	}
	if err := r.table.Apply(route.Plan(ps, sas, o)); err != nil {
		in.log.Error("routes are not as policy wants them; tried again", zap.Error(err))
	}
	r.took = time.Since(start)
}

func outbound(all []*ipsec.Policy) (ps []*ipsec.Policy) {
	for _, p := range all {
		if p.Dir == ipsec.Out {
			ps = append(ps, p)
		}
	}
	return ps
}

// anyPeer: SAs tell who the peers are.
func anyPeer(ps []*ipsec.Policy) bool {
	for _, p := range ps {
		for i := range p.Requests {
			if p.Requests[i].AnyPeer() {
				return true
			}
		}
	}
	return false
}

// outboundSAs are those that have keys, from this host to others.
func outboundSAs(db *sad.DB, local func(netip.Addr) bool) (sas []*ipsec.SAParams) {
	db.Each(func(s *sad.SA) bool {
		if st := s.State(); (st == sad.Mature || st == sad.Dying) && !local(s.P.Dst) && (local(s.P.Src) || s.AnySource()) {
			sas = append(sas, &s.P)
		}
		return true
	})
	return sas
}

// routeErrors never delivers where there are no routes of ours.
func (in *instance) routeErrors() <-chan error {
	if in.routes == nil {
		return nil
	}
	return in.routes.table.Errors()
}

// RouteStatus describes the routes.
type RouteStatus struct {
	Mode         string `json:"mode"`
	Table        int    `json:"table,omitempty"`
	Rule         int    `json:"rule,omitempty"` // its priority
	Destinations int    `json:"destinations"`
}

func (in *instance) routeStatus() RouteStatus {
	s := RouteStatus{Mode: in.o.routes}
	if in.routes != nil {
		s.Table, s.Destinations = in.routes.table.Number()
		s.Rule = route.Priority
	}
	return s
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/crypto/aead"
	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/daemon"
	"github.com/missiu/missiu/pkg/datapath"
	"github.com/missiu/missiu/pkg/datapath/bump"
	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
	"github.com/missiu/missiu/pkg/datapath/tap"
	"github.com/missiu/missiu/pkg/datapath/wire"
	"github.com/missiu/missiu/pkg/datapath/wire/route"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keyengine"
	"github.com/missiu/missiu/pkg/keysock"
	"github.com/missiu/missiu/pkg/natt"
)

// worstOverhead is what protection can add at most: outer IPv6 header, UDP,
// ESP header with a 16-octet IV, padding, trailer, a 32-octet ICV. The TAP's
// MTU leaves room for it until SAs tell how much they need.
const worstOverhead = 40 + 8 + 8 + 16 + 15 + 2 + 32

func nattPath(ifname string) string { return natt.Path(ifname) }

// instance is everything that one daemon owns.
type instance struct {
	o     *options
	log   *zap.Logger
	since time.Time
	wire  physical
	tap   tap.Device
	vips  *tap.Set     // tap, with --vips own
	udps  []*wire.UDP  // of port 4500; none: no ESP in UDP, or port serves
	port  wire.UDPConn // what IKE leaves by; nil: nothing
	bump  *bump.Bump   // nil: not severed
	ctl   *attach.Server
	taps  []*bump.Tap // of high and low
	// Of the process that opens the way when this one has died; nil: there is none.
	opener *os.File
	lost   error // why a severed interface is not what it was, in the end
	sad    *sad.DB
	keys   *keyengine.Engine
	rec    *recorder
	srv    *keysock.Server
	natt   *natt.Server
	eng    *datapath.Engine
	mon    *capture.Hub

	routes   *routing     // nil: --routes none
	assigned []netip.Addr // what peers have given us; of Serve's goroutine
	awaited  []netip.Addr // what they had; likewise
	restored bool         // what an instance before had is in force, so policies may be saved and routed

	undiverted bool // a change of the divert set went wrong: all is to be set
}

// serve is the daemon: it returns when a signal stopped it, or it failed.
func serve(o *options) (err error) {
	ready := daemon.NewReadiness(o.child)
	defer func() {
		if err != nil {
			ready.Fail(err)
		}
	}()
	if o.crypto == "std" {
		aead.UseStandardLibrary()
	}
	// A thread in a system call of some length loses its processor; with as many
	// again nobody waits for it to come back.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(4, 2*runtime.NumCPU()))
	}
	log, logFile, err := openLog(o)
	if err != nil {
		return err
	}
	defer log.Sync()
	hup := func() {
		if logFile != nil {
			if err := logFile.Reopen(); err != nil {
				log.Error("log file not opened again", zap.Error(err))
			}
		}
	}
	ctx, cancel := daemon.Signals(context.Background(), hup)
	defer cancel()
	if o.cpuProfile != "" {
		stop, err := profileCPU(o.cpuProfile)
		if err != nil {
			return err
		}
		defer stop()
	}
	// From here on TERM ends us in an orderly way, so stop may send it.
	pid, err := daemon.LockPidFile(pidPath(o.ifname))
	if err != nil {
		return fmt.Errorf("%s: %w", o.ifname, err)
	}
	defer pid.Close()
	in := &instance{o: o, log: log.Named("missiu").With(zap.String("if", o.ifname)), since: time.Now()}
	adopted, err := tap.Find(o.ifname)
	if err != nil {
		return err
	}
	if err := in.fits(adopted); err != nil {
		return err
	}
	if err := in.open(adopted); err != nil {
		// Nothing half done; but what a killed predecessor keeps closed stays so.
		if adopted == "" && (in.bump == nil || !in.bump.Adopted()) {
			in.closeDevices()
			in.close()
			err = errors.Join(err, in.lost)
		}
		return err
	}
	in.log.Info("ready", zap.Int("pid", os.Getpid()), zap.String("tap", in.tap.Name()), zap.Bool("udp4500", in.port != nil))
	ready.Ready()
	if err := in.run(ctx); err != nil {
		// As after a kill: what policy protects stays closed until stop or startRaw.
		in.log.Error("failed; protected traffic stays blocked until startRaw or stop", zap.Error(err))
		return err
	}
	in.close()
	in.log.Info("stopped")
	return in.lost
}

// profileCPU samples until stop, which writes the file. Only its owner can read
// it: what runs when tells of the traffic.
func profileCPU(path string) (stop func(), err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Chmod(0o600), pprof.StartCPUProfile(f)); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return func() {
		pprof.StopCPUProfile()
		f.Close()
	}, nil
}

func openLog(o *options) (*zap.Logger, *daemon.LogFile, error) {
	if o.log != "" {
		f, err := daemon.OpenLog(daemon.LogPath(o.log))
		if err != nil {
			return nil, nil, err
		}
		return daemon.NewLogger(f, zapcore.InfoLevel), f, nil
	}
	if o.child {
		return zap.NewNop(), nil, nil
	}
	return daemon.NewLogger(zapcore.Lock(os.Stderr), zapcore.InfoLevel), nil, nil
}

// open makes everything, in an order in which nothing passes that should not:
// the policies of a killed predecessor are in force before packets move.
func (in *instance) open(adopted string) (err error) {
	ifname := in.o.ifname
	if in.o.inline {
		return in.openInline()
	}
	w, err := wire.Open(ifname, wire.Options{Native: in.o.native, Readers: in.o.queues, Wait: in.o.wait})
	if err != nil {
		return err
	}
	in.wire = w
	link := w.Link()
	name := in.o.device()
	if name == "" {
		name = adopted
	}
	if err := in.openTAP(tap.Options{
		TUN: in.o.tun, Name: name, For: ifname, MAC: link.MAC, MTU: tapMTU(link.MTU, link.MTU-worstOverhead),
		Offload: in.o.offload, ReadOffload: true, Queues: in.o.queues, Up: in.o.routes != routesNone, Wait: in.o.wait,
	}); err != nil {
		return err
	}
	if in.o.routes != routesNone {
		r := route.Options{Interface: ifname, Index: link.Index, Device: in.tap.Index()}
		if in.vips != nil {
			r.More = in.vipDevices
		}
		t, err := route.Open(r)
		if err != nil {
			return fmt.Errorf("routes: %w", err)
		}
		in.routes = &routing{table: t}
	}
	if lack := in.missing(); lack != "" {
		in.log.Warn("the kernel lacks an offload of the tap; slower", zap.String("lack", lack))
	}
	queues := len(in.tap.Queues())
	if queues < in.o.queues {
		in.log.Warn("the tap has one queue", zap.Int("wanted", in.o.queues))
	}
	plain := in.o.offload == tap.OffloadNone || in.o.udp == "plain"
	if in.udps, err = w.OpenUDPs(queues, wire.UDPOptions{GRO: !plain, Plain: plain, Wait: in.o.wait}); err != nil {
		in.udps = nil
		if !errors.Is(err, wire.ErrPortTaken) {
			return err
		}
		in.log.Warn("no ESP in UDP: port 4500 is taken", zap.Error(err))
	}
	var c datapath.Config
	for k, u := range in.udps {
		if k == 0 {
			c.UDP, in.port = u, u
		} else {
			c.MoreUDP = append(c.MoreUDP, u)
		}
	}
	c.MoreWire = w.MoreReaders()
	return in.openEngine(c)
}

// openEngine makes what all modes have, over the devices. c holds what is the
// mode's own.
func (in *instance) openEngine(c datapath.Config) (err error) {
	ifname := in.o.ifname
	queues := len(in.tap.Queues())
	db, pol := sad.NewDB(), spd.NewDB()
	in.sad = db
	in.keys = keyengine.New(keyengine.Options{
		SAD: db, SPD: pol, Queues: queues,
		AllowUnauthenticated: in.o.unauthenticated,
		AllowLegacy:          in.o.legacy,
		LegacyRefused: func(id ipsec.SAID, e alg.Encr, a alg.Integ) {
			in.log.Warn("SA with a legacy algorithm refused; --allow-legacy takes it", zap.Stringer("sa", id), zap.Stringer("encr", e), zap.Stringer("auth", a))
		},
		Installed:     func(k sad.OutKey) { in.eng.Installed(k); in.saChanged() },
		Removed:       func(*sad.SA) { in.saChanged() },
		Failed:        func(k sad.OutKey) { in.eng.Failed(k) },
		Overhead:      in.overhead,
		Divert:        in.divert,
		Policies:      in.policiesChanged,
		AddAddress:    in.addAddress,
		DeleteAddress: in.deleteAddress,
		Status:        in.status,
	})
	in.rec = newRecorder(in.keys, ifname)
	low := capture.Interface{Name: ifname, Link: capture.LinkIP}
	if in.bump != nil {
		low.Link = capture.LinkEthernet
	}
	in.mon = capture.NewHub(low, capture.Interface{Name: in.tap.Name(), Link: capture.LinkEthernet})
	c = datapath.Config{
		Low: c.Low, Bridged: c.Bridged, Heard: c.Heard, UDP: c.UDP, MoreUDP: c.MoreUDP, MoreWire: c.MoreWire,
		TAP: in.tap, Wire: in.wire, SAD: db, SPD: pol, Default: in.o.defaultAction(), KeepMSS: in.o.mss == "keep",
		NeedSA: in.keys.NeedSA, LimitReached: in.keys.LimitReached, NewMapping: in.keys.NewMapping,
		IKE:     func(local, remote netip.AddrPort, msg []byte) bool { return in.natt.Deliver(local, remote, msg) },
		Monitor: in.mon, Log: in.log,
	}
	if in.eng, err = datapath.New(c); err != nil {
		return err
	}
	in.wire.VerifyTooBig(func(t wire.TooBig) bool { return sent(db, &t) })
	if in.srv, err = keysock.NewServer(keysock.Path(ifname), in.keys, keysock.ServerOptions{Abstract: in.o.abstract}); err != nil {
		return err
	}
	in.keys.Attach(in.srv)
	if in.o.defaultAction() == ipsec.Discard {
		if err := in.wire.SetDivert(diverted(ipsec.Discard, nil)); err != nil {
			return err
		}
	}
	if err := in.rec.restore(); err != nil {
		return fmt.Errorf("policies of the instance before: %w", err)
	}
	if n := in.keys.Stats().Policies; n > 0 {
		in.log.Warn("took over after an instance that was killed", zap.Int("policies", n))
	}
	in.restored = true
	in.reroute(true)
	if in.vips == nil {
		// Of an instance that was killed and had --vips own; its routes lead elsewhere now.
		if _, err := tap.RemoveMembers(ifname); err != nil {
			return err
		}
	}
	if in.port != nil { // else ike is to know that there is none
		if in.natt, err = natt.Listen(nattPath(ifname), in.sendIKE); err != nil {
			return err
		}
	}
	if in.bump != nil {
		in.bump.Monitor(in.mon, func(err error) { in.log.Warn("a passive side is not monitored", zap.Error(err)) })
	}
	return in.mon.Listen(attach.Path(ifname, capture.Purpose))
}

// run moves packets and answers requests until ctx ends, then closes the
// devices and returns nil; or something fails, whose error it returns at once,
// with everything left as it is.
func (in *instance) run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return in.srv.Serve(gctx) })
	g.Go(func() error { return in.keys.Run(gctx) })
	g.Go(func() error { return in.eng.Run(gctx) })
	g.Go(func() error { in.rec.save(gctx, in.srv.Do, in.log); return nil })
	g.Go(func() error { return in.follow(gctx) })
	<-gctx.Done()
	if ctx.Err() == nil {
		return context.Cause(gctx)
	}
	in.closeDevices() // ends the engine's blocking reads
	if err := g.Wait(); err != nil {
		in.log.Warn("while stopping", zap.Error(err))
	}
	return nil
}

// follow adapts to changes of the interface.
func (in *instance) follow(ctx context.Context) error {
	bumped, failed := in.bumpNews()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-bumped:
			in.bumpEvent(e)
		case err := <-failed:
			in.log.Error("the interface cannot be used yet; tried again", zap.Error(err))
		case f := <-in.wire.Fallbacks():
			in.log.Warn("a fast path is not to be had", zap.String("path", f.Path), zap.String("instead", f.To), zap.Error(f.Err))
		case err := <-in.routeErrors():
			if err != nil {
				in.log.Error("routes are not as policy wants them; tried again", zap.Error(err))
			} else {
				in.log.Info("routes are as policy wants them again")
			}
		case err := <-in.wire.Tampered():
			if err != nil {
				in.log.Error("somebody removed rules of the packet filter; clear text may come in until they are back", zap.Error(err))
			} else {
				in.log.Warn("somebody removed rules of the packet filter (nft flush ruleset?); they are back")
			}
		case l, ok := <-in.wire.Changes():
			if !ok {
				if err := in.wire.Err(); err != nil && ctx.Err() == nil {
					return err
				}
				return nil
			}
			in.srv.Do(in.overhead)
			in.srv.Do(func() { in.reroute(false) }) // tunnels may leave our end open
			in.log.Info("interface changed", zap.Bool("up", l.Up), zap.Int("mtu", l.MTU), zap.Stringer("mac", l.MAC))
		}
	}
}

// policiesChanged has them routed, and saved.
func (in *instance) policiesChanged(l []spd.Change, batch bool) {
	if in.restored {
		in.reroute(batch)
		in.rec.note(l)
	}
}

// overhead gives the TAP the MTU that the SAs leave (DESIGN, decision 4).
func (in *instance) overhead() {
	link := in.wire.Link().MTU
	if in.bump != nil {
		return // the interface's is the kernel's, and ICMP and MSS tell what is less
	}
	inner := in.keys.InnerMTU(link)
	if inner == link { // no SAs yet
		inner -= worstOverhead
	}
	mtu := tapMTU(link, inner)
	if mtu == in.tap.MTU() {
		return
	}
	if err := in.tap.SetMTU(mtu); err != nil {
		in.log.Warn("mtu of the tap not set", zap.Int("mtu", mtu), zap.Error(err))
	}
}

// tapMTU never goes below what IPv6 needs, if the link itself has that much:
// the kernel would take IPv6 off the TAP. Results that are too long then are
// cut into fragments.
func tapMTU(link, mtu int) int {
	if mtu < packet.MinIPv6MTU && link >= packet.MinIPv6MTU {
		return packet.MinIPv6MTU
	}
	return max(mtu, packet.MinIPv4MTU)
}

// divert has the kernel kept from packets of protected sources; from all where
// the default is to drop, which only we can do.
func (in *instance) divert(c keyengine.DivertChange) error {
	if in.o.defaultAction() == ipsec.Discard {
		return nil // all of them already
	}
	var err error
	if in.undiverted {
		err = in.wire.SetDivert(diverted(ipsec.Bypass, c.Set()))
	} else {
		err = in.wire.ChangeDivert(c.Add, c.Remove)
	}
	in.undiverted = err != nil
	return err
}

func diverted(byDefault ipsec.Action, remotes []netip.Prefix) (v4, v6 []netip.Prefix) {
	if byDefault == ipsec.Discard {
		return []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, []netip.Prefix{netip.MustParsePrefix("::/0")}
	}
	for _, p := range remotes {
		if p.Addr().Is4() {
			v4 = append(v4, p)
		} else {
			v6 = append(v6, p)
		}
	}
	return v4, v6
}

// sent reports whether an ICMP error quotes a packet that one of our SAs could
// have sent: the only ones whose word about the path counts (RFC 4301, 8.2.1).
func sent(db *sad.DB, t *wire.TooBig) bool {
	return t.SPI != 0 && db.LookupSPI(ipsec.ESP, ipsec.SPI(t.SPI), t.Dst) != nil
}

// sendIKE sends a message of the key daemon from port 4500, behind the non-ESP
// marker; a keepalive goes without it.
func (in *instance) sendIKE(m natt.Message) {
	b := m.Payload
	if len(b) != 1 {
		b = append(make([]byte, 4, 4+len(b)), b...)
	}
	d := wire.Datagram{Buf: b, Len: len(b), Local: m.Local, Remote: m.Remote}
	_, err := in.port.WriteBatch([]wire.Datagram{d})
	in.eng.Sent(&d, err)
	if err != nil {
		in.log.Debug("ike message not sent", zap.Stringer("peer", m.Remote), zap.Error(err))
	}
}

func (in *instance) status() ([]byte, error) {
	link, ks, es := in.wire.Link(), in.keys.Stats(), in.eng.Stats()
	from, to := in.wire.Path()
	s := Status{
		Interface: in.o.ifname, Pid: os.Getpid(), Version: buildVersion(), Since: in.since, Mode: in.o.mode(),
		Default: in.o.defaultRule, MTU: link.MTU,
		TAP: TAPStatus{in.tap.Name(), in.tap.MAC().String(), in.tap.MTU()}, VIPs: in.vipStatus(), Routes: in.routeStatus(),
		Paths: map[string]string{"native esp": "in: " + from + "; out: " + to, "esp in udp": "off: port 4500 is taken", "tap offload": in.tapPath(), "aes": aead.Implementation()},
		SAs:   ks.SAs, Policies: ks.Policies, Held: in.eng.Held(), Counters: es.Map(),
	}
	if in.udps != nil {
		from, to := in.udps[0].Path()
		s.Paths["esp in udp"] = "in: " + from + "; out: " + to
		us := wire.SumUDP(in.udps)
		s.Counters["udp_sent_trains"], s.Counters["udp_sent_singles"] = us.Trains, us.Singles
		s.Counters["udp_trains_refused"], s.Counters["udp_send_refused"] = us.Fallbacks, us.Refused
		s.Counters["udp_messages"], s.Counters["udp_truncated"], s.Counters["udp_kernel_drops"] = us.Messages, us.Truncated, us.KernelDrops
		s.Counters["drop_in_overload"] = us.Shed
	}
	if in.bump != nil {
		in.bumpStatus(&s)
	}
	lost := in.tap.Lost()
	s.Counters["tap_queue_full"], s.Counters["drop_out_overload"] = lost.Full, lost.Shed
	ws := in.wire.Stats()
	s.Counters["wire_sent_xdp"], s.Counters["wire_sent_packet"], s.Counters["wire_sent_raw"] = ws.SentXDP, ws.SentPacket, ws.Sent-ws.SentXDP-ws.SentPacket
	s.Counters["wire_kernel_drops"] = ws.KernelDrops
	s.Counters["wire_truncated"] = ws.Truncated
	s.Counters["wire_send_refused"] = ws.SendTooBig + ws.SendNoBufs + ws.SendDenied + ws.SendOther
	for why, n := range in.eng.FragmentDrops() {
		s.Counters["fragment_"+why] = n
	}
	s.Queues = in.queueStatus()
	ns := in.natt.Stats()
	s.Counters["natt_delivered"], s.Counters["natt_no_client"], s.Counters["natt_slow"] = ns.Delivered, ns.NoClient, ns.Slow
	kc := in.srv.Stats()
	s.Counters["pfkey_requests"], s.Counters["pfkey_errors"], s.Counters["pfkey_events_dropped"] = kc.Requests, kc.Errors, kc.Dropped
	s.Counters["pfkey_refused"], s.Counters["pfkey_stalled"] = kc.Refused, kc.Stalled
	return json.Marshal(&s)
}

// queueStatus tells of the queues, if there are several.
func (in *instance) queueStatus() []QueueStatus {
	work := in.eng.Queues()
	if len(work) < 2 {
		return nil
	}
	qs := make([]QueueStatus, len(work))
	for k, w := range work {
		qs[k] = QueueStatus{Queue: k + 1, Out: w.Out, In: w.In}
	}
	in.sad.Each(func(sa *sad.SA) bool {
		if n := int(sa.P.Queue); n > 0 && n <= len(qs) {
			qs[n-1].SAs++
		}
		return true
	})
	return qs
}

// missing names the super-frames that were asked for and that the kernel does
// not give or take.
func (in *instance) missing() string {
	if in.o.offload == tap.OffloadNone {
		return ""
	}
	var lack []string
	for what, has := range map[string]tap.Super{"reading": in.tap.ReadSuper(), "writing": in.tap.Super()} {
		if !has.TCP4 || !has.TCP6 {
			lack = append(lack, "TCP super-frames on "+what)
		}
		if !has.UDP {
			lack = append(lack, "UDP super-frames on "+what)
		}
	}
	slices.Sort(lack)
	return strings.Join(lack, ", ")
}

// tapPath tells which super-frames pass the TAP.
func (in *instance) tapPath() string {
	if in.o.offload == tap.OffloadNone {
		return in.o.offload
	}
	return fmt.Sprintf("read: %v; write: %v", in.tap.ReadSuper(), in.tap.Super())
}

// closeDevices gives the host back what was taken from it.
func (in *instance) closeDevices() {
	if in.mon != nil {
		in.mon.Close()
	}
	if in.natt != nil {
		in.natt.Close()
	}
	for _, u := range in.udps {
		u.Close()
	}
	if in.routes != nil {
		in.routes.table.Close()
	}
	if _, err := route.Cleanup(in.o.ifname); err != nil { // also of an instance before
		in.log.Error("routes stay", zap.Error(err))
	}
	if in.ctl != nil {
		in.ctl.Close()
	}
	for _, t := range in.taps {
		t.Close()
	}
	if in.bump != nil {
		if in.lost = in.bump.Close(); in.lost != nil {
			in.log.Error("interface not opened again, or not as it was", zap.Error(in.lost))
		}
	}
	if in.opener != nil {
		if in.lost == nil {
			in.opener.WriteString("stopped\n")
		}
		in.opener.Close()
		in.opener = nil
	}
	if in.tap != nil {
		if err := in.tap.Persist(false); err != nil {
			in.log.Error("tap stays", zap.Error(err))
		}
		in.tap.Close()
	}
	if in.wire != nil {
		if err := in.wire.Close(); err != nil {
			in.log.Error("interface not given back", zap.Error(err))
		}
	}
}

// close ends what holds keys and files.
func (in *instance) close() {
	if in.srv != nil {
		in.srv.Close()
	}
	if in.keys != nil {
		in.keys.Close()
	}
	removeState(in.o.ifname)
}

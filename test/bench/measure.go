package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net/rpc"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/missiu/missiu/test/bench/report"
	"github.com/missiu/missiu/test/bench/stat"
	"github.com/missiu/missiu/test/bench/traffic"
	"github.com/missiu/missiu/test/e2e/lab"
)

// instance is a system at work on gateways of its own. All instances are
// alike but for the system, so that nothing that one of them leaves (routes,
// packet filters) costs another; those not measured are stopped (SIGSTOP).
type instance struct {
	*system
	*ends
	t       *lab.Test
	procs   []*lab.Proc
	daemons []int           // their pids
	client  [2]*rpc.Client  // agents of a and b
	run     uint64          // of UDP
	rate    map[int]float64 // where the search for a size of datagrams starts
}

// startInstance makes gateways and starts a system on them; flags are further
// ones for missiu.
func startInstance(s *system, set report.Setting, flags ...string) (*instance, error) {
	in := &instance{system: s, t: lab.NewTest(), rate: map[int]float64{}}
	err := in.t.Try(func(t lab.TB) {
		in.ends = newEnds(t, s.ID, set.Family == 6)
		if !set.Offload {
			in.noOffload(t)
		}
		for i, x := range in.both() {
			in.client[i] = startAgent(t, x.Host)
		}
		in.procs = s.start(t, in.ends, flags...)
		for _, p := range in.procs {
			pid := p.Pid()
			if pid == 0 {
				t.Fatalf("a daemon of %s has ended:\n%s", s.ID, p.Output())
			}
			in.daemons = append(in.daemons, pid)
		}
		in.warm(t)
	})
	return in, err
}

// noOffload keeps super-frames from the wire.
func (in *instance) noOffload(lab.TB) {
	for _, x := range in.both() {
		x.Must("ethtool", "-K", "eth0", "gso", "off", "tso", "off", "gro", "off", "tx-udp-segmentation", "off")
	}
}

func startAgent(t lab.TB, h *lab.Host) *rpc.Client {
	exe, err := os.Executable()
	if err != nil {
		t.Fatalf("%v", err)
	}
	sock := filepath.Join(h.Dir, "agent")
	p := h.Start(exe, agentVerb, sock)
	var c *rpc.Client
	lab.Until(t, 20*time.Second, "the agent to listen", func() (bool, string) {
		if p.Ended() {
			t.Fatalf("the agent ended:\n%s", p.Output())
		}
		var err error
		c, err = rpc.Dial("unix", sock)
		return err == nil, fmt.Sprint(err)
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// warm waits until packets pass both ways: the first ones negotiate.
func (in *instance) warm(t lab.TB) {
	lab.Until(t, 30*time.Second, in.ID+" to carry a ping", func() (bool, string) {
		r := in.a.Run("ping", "-n", "-q", "-c", "3", "-i", "0.02", "-W", "1", in.a.innerPeer.String())
		return r.Code == 0 && strings.Contains(r.Out, "3 received"), r.String()
	})
}

// freeze stops the daemons, so that they cost the others nothing.
func (in *instance) freeze() error {
	return in.t.Try(func(lab.TB) {
		for _, p := range in.procs {
			p.Pause()
		}
	})
}

// thaw has them go on.
func (in *instance) thaw() error {
	for _, p := range in.procs {
		p.Resume()
	}
	if err := in.t.Try(in.warm); err != nil {
		return err
	}
	return in.rest()
}

// restLimit is how long daemons may take to come to rest, which is to use less than
// a twentieth of a processor for calmSample.
const restLimit = 10 * time.Second

// rest waits until the daemons have done what they owe since they were started or
// stopped: a collector that looks at its heap every two minutes does so as soon as
// it goes on, and after a stop of minutes that would fall into each measurement,
// which lasts a second.
func (in *instance) rest() error {
	for end := time.Now().Add(restLimit); time.Now().Before(end); {
		before, err := cpuSum(in.daemons)
		if err != nil {
			return err
		}
		start := time.Now()
		time.Sleep(calmSample)
		after, err := cpuSum(in.daemons)
		if err != nil || after-before < time.Since(start)/20 {
			return err
		}
	}
	return nil // it works without traffic, which is measured with the rest
}

// checkWire captures the wire while marked datagrams pass and says what it saw.
func (in *instance) checkWire() (said string, err error) {
	err = in.t.Try(func(t lab.TB) {
		var only []string
		if strings.HasPrefix(in.ID, report.MissiuInline) { // what comes in shows also as it is handed to the kernel
			only = []string{"outbound"}
		}
		c := in.a.CaptureWhole("eth0", only...)
		trial, err := in.udp(1000, 2000, 100*time.Millisecond)
		if err != nil {
			t.Fatalf("%v", err)
		}
		if err := in.tcpShort(); err != nil {
			t.Fatalf("%v", err)
		}
		said, err = in.wire.check(c.Stop(), int(trial.Delivered*0.1))
		if err != nil {
			t.Fatalf("%s: %v", in.ID, err)
		}
	})
	return said, err
}

// check: every packet is of the system's kind and none shows the marker; of a
// readable wire it has to be there, or the look for it would prove nothing.
// want is how many packets have to be there at least.
func (k wireKind) check(ps []lab.Packet, want int) (said string, err error) {
	ours, octets := 0, 0
	for _, p := range ps {
		marked := bytes.Contains(p.Frame, []byte(traffic.Marker))
		switch {
		case p.Kind == lab.Neighbour || p.Kind == lab.Multicast:
		case marked && k != readable:
			return "", fmt.Errorf("the wire shows what should be secret: %v", p)
		case !k.shows(p):
			return "", fmt.Errorf("on the wire: %v; want %v only", p, k)
		case marked || k != readable:
			ours++
			octets += p.Len
		}
	}
	// Super-frames hold many packets each.
	if octets < want*1000 {
		return "", fmt.Errorf("%d octets of %v on the wire for %d datagrams of 1000", octets, k, want)
	}
	if k == readable {
		return fmt.Sprintf("%d frames, %d octets, readable, as it should be", ours, octets), nil
	}
	return fmt.Sprintf("%d frames, %d octets, all %v; the marker that every packet carries is nowhere to be read", ours, octets, k), nil
}

// tcpShort sends no more than a capture can keep up with.
func (in *instance) tcpShort() error {
	var sent traffic.TCPSent
	return in.client[0].Call("Agent.TCPSend", traffic.TCPSend{To: in.b.inner, Streams: 1, Octets: 4 << 20, Duration: 50 * time.Millisecond}, &sent)
}

// figures are what a work measured, in the units of the samples.
type figures map[report.Metric]float64

// ramp is how long TCP has to find its rate before the measured window.
const ramp = 400 * time.Millisecond

// tcp measures octets a second, and CPU for each packet.
func (in *instance) tcp(streams int, window time.Duration, rate, cpu, total report.Metric) (figures, error) {
	var sent traffic.TCPSent
	call := in.client[0].Go("Agent.TCPSend", traffic.TCPSend{To: in.b.inner, Streams: streams, Duration: ramp + window + 50*time.Millisecond}, &sent, nil)
	time.Sleep(ramp)
	before, err := in.count()
	if err != nil {
		return nil, err
	}
	time.Sleep(window)
	after, err := in.count()
	if err != nil {
		return nil, err
	}
	if <-call.Done; call.Error != nil {
		return nil, fmt.Errorf("TCP: %w", call.Error)
	}
	octets := float64(after.octets - before.octets)
	if octets == 0 || sent.MSS == 0 {
		return nil, errors.New("TCP: nothing came")
	}
	if over := after.onWire - before.onWire; float64(over) < octets*0.9 {
		return nil, fmt.Errorf("TCP: %.0f octets came, but only %d went over the wire", octets, over)
	}
	packets := octets / float64(sent.MSS)
	f := figures{rate: octets * 8 / after.at.Sub(before.at).Seconds()}
	f[total] = float64(before.busy(after.usage)) / packets
	if len(in.daemons) > 0 {
		f[cpu] = float64(after.cpu-before.cpu) / packets
	}
	return f, nil
}

// counts are all counters at one time.
type counts struct {
	*usage
	octets uint64        // received by TCP at b
	onWire uint64        // sent by a's eth0
	cpu    time.Duration // of the daemons
}

func (in *instance) count() (*counts, error) {
	c := &counts{}
	var errs [4]error
	c.usage, errs[0] = look()
	errs[1] = in.client[1].Call("Agent.TCPReceived", traffic.Empty{}, &c.octets)
	c.cpu, errs[2] = cpuSum(in.daemons)
	var n int
	n, errs[3] = in.a.counter("eth0", "tx_bytes")
	c.onWire = uint64(n)
	return c, errors.Join(errs[:]...)
}

// netFile is a file of the host's /proc/net, which shows through the pid of its
// init only: self there is somebody of the reader's own pid namespace.
func (x *end) netFile(name string) string { return x.Path("../net/" + name) }

// counter reads one of the kernel's counters of an interface.
func (x *end) counter(ifname, name string) (int, error) {
	b, err := os.ReadFile(x.netFile("dev"))
	if err != nil {
		return 0, err
	}
	return parseNetDev(string(b), ifname, name)
}

// parseNetDev finds a counter in the text of /proc/net/dev.
func parseNetDev(text, ifname, name string) (int, error) {
	columns := map[string]int{"rx_bytes": 0, "rx_packets": 1, "rx_dropped": 3, "tx_bytes": 8, "tx_packets": 9, "tx_dropped": 11}
	for line := range strings.Lines(text) {
		dev, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if ok && strings.TrimSpace(dev) == ifname && len(f) >= 16 {
			return strconv.Atoi(f[columns[name]])
		}
	}
	return 0, fmt.Errorf("/proc/net/dev has no line for %s", ifname)
}

// udp offers datagrams of a payload at a rate; 0: without pause.
func (in *instance) udp(size int, rate float64, d time.Duration) (stat.Trial, error) {
	in.run++
	var sent traffic.UDPSent
	if err := in.client[0].Call("Agent.UDPSend", traffic.UDPSend{To: in.b.inner, Run: in.run, Size: size, Rate: rate, Duration: d}, &sent); err != nil {
		return stat.Trial{}, err
	}
	var got traffic.UDPCount
	if err := in.client[1].Call("Agent.UDPCount", in.run, &got); err != nil {
		return stat.Trial{}, err
	}
	if sent.Packets == 0 {
		return stat.Trial{}, errors.New("UDP: nothing could be sent")
	}
	secs := sent.Elapsed.Seconds()
	return stat.Trial{
		Offered: rate, Sent: float64(sent.Packets) / secs, Delivered: float64(got.Packets) / secs,
		Loss: max(0, 1-float64(got.Packets)/float64(sent.Packets)),
	}, nil
}

// payload is what a datagram of an IP packet of 1400 octets holds; all tunnels
// take that whole. Small ones are 64 octets of payload.
func (in *instance) payload(size int) int {
	if size < 1400 {
		return size
	}
	if in.v6 {
		return size - 48
	}
	return size - 28
}

// udpSearch finds the highest rate with at most 1 % lost, the CPU per packet
// at that rate, and what is delivered of datagrams sent without pause.
func (in *instance) udpSearch(size int, p *pace, best, cpu, blast report.Metric) (figures, error) {
	payload := in.payload(size)
	start := in.rate[size]
	if start == 0 {
		start = 40000
	}
	s := stat.Search{Loss: 0.01, Start: start, Floor: 200, Step: p.step, Trials: p.trials}
	perPacket := map[float64]float64{} // CPU by delivered rate
	t, ok, err := s.Run(func(rate float64) (stat.Trial, error) {
		before, err := cpuSum(in.daemons)
		if err != nil {
			return stat.Trial{}, err
		}
		t, err := in.udp(payload, rate, p.trial)
		if err != nil {
			return t, err
		}
		after, err := cpuSum(in.daemons)
		perPacket[t.Delivered] = float64(after-before) / (t.Delivered * p.trial.Seconds())
		return t, err
	})
	if err != nil {
		return nil, err
	}
	f := figures{}
	if ok {
		// A little below, so that the next round sees both sides of the limit.
		in.rate[size] = t.Offered * 0.95
		f[best] = t.Delivered
		if len(in.daemons) > 0 {
			f[cpu] = perPacket[t.Delivered]
		}
	}
	all, err := in.udp(payload, 0, p.trial)
	f[blast] = all.Delivered
	return f, err
}

// ping measures the round trip on an idle path.
func (in *instance) ping(n int) (figures, error) {
	r := in.a.Run("ping", "-n", "-i", "0.005", "-c", strconv.Itoa(n), "-W", "1", in.a.innerPeer.String())
	rtts := parsePing(r.Out)
	if len(rtts) < n*9/10 {
		return nil, fmt.Errorf("ping: %d of %d answered", len(rtts), n)
	}
	return figures{report.PingP50: stat.Quantile(rtts, 0.5), report.PingP99: stat.Quantile(rtts, 0.99)}, nil
}

var pingTime = regexp.MustCompile(`(?m)time=([0-9.]+) ms$`)

// parsePing returns the round trips in seconds.
func parsePing(out string) []float64 {
	var rtts []float64
	for _, m := range pingTime.FindAllStringSubmatch(out, -1) {
		if ms, err := strconv.ParseFloat(m[1], 64); err == nil {
			rtts = append(rtts, ms/1000)
		}
	}
	return rtts
}

// floods are what overload offers: datagrams one by one at twice what fits (as
// searched before, or found now), and as super-frames at whatever the sender can.
var floods = []struct {
	size  int
	super bool
	ping  report.Metric
}{
	{1400, false, report.OverPing},
	{64, false, report.OverPing64},
	{1400, true, report.OverPingSuper},
}

// overload offers too much, of each kind in turn, and
// looks at memory, at a ping, and at whether each loss is in a counter. The figures
// but for the latency are those of the worst kind.
func (in *instance) overload(p *pace) (figures, error) {
	f := figures{}
	for _, k := range floods {
		rate := 0.0
		if !k.super {
			if in.rate[k.size] == 0 {
				if _, err := in.udpSearch(k.size, p, report.UDP1400, report.UDP1400CPU, report.UDP1400Blast); err != nil {
					return nil, err
				}
			}
			if rate = 2 * in.rate[k.size]; rate == 0 {
				return nil, errors.New("overload: no rate is without loss")
			}
		}
		o, err := in.flood(k.size, rate, k.super)
		if err != nil {
			return nil, err
		}
		f[k.ping] = o.ping
		f[report.OverFlow] = max(f[report.OverFlow], o.flow)
		f[report.OverRTT] = max(f[report.OverRTT], o.rtt)
		if tcp, ok := f[report.OverTCP]; !ok || o.tcp < tcp {
			f[report.OverTCP] = o.tcp
		}
		f[report.OverMemory] = max(f[report.OverMemory], o.memory)
		f[report.OverLost] = max(f[report.OverLost], o.lost)
		if counted, ok := f[report.OverCounted]; !math.IsNaN(o.counted) && (!ok || o.counted < counted) {
			f[report.OverCounted] = o.counted
		}
		if rate > 0 && k.size == 1400 {
			f[report.OverOffered] = 2 * o.sent / rate
		}
	}
	return f, nil
}

// flooded is what a flood did.
type flooded struct {
	sent    float64 // packets a second
	ping    float64 // 99th percentile of those answered, seconds
	flow    float64 // 99th percentile of the flow's delays one way, seconds
	rtt     float64 // of TCP, seconds
	tcp     float64 // bit/s
	lost    float64 // pings, or of the flow, whatever is more, 0 to 1
	memory  float64 // growth, octets
	counted float64 // of what was lost; NaN: nothing was
}

func (in *instance) flood(size int, rate float64, super bool) (flooded, error) {
	o := flooded{counted: math.NaN()}
	each := 1
	if super {
		each = traffic.SuperSegments(in.payload(size))
	}
	before, err := in.drops(each)
	if err != nil {
		return o, err
	}
	idle, err := resident(in.daemons)
	if err != nil {
		return o, err
	}
	in.run++
	var sent traffic.UDPSent
	const length = 1500 * time.Millisecond
	call := in.client[0].Go("Agent.UDPSend", traffic.UDPSend{To: in.b.inner, Run: in.run, Size: in.payload(size), Rate: rate, CatchUp: true, Super: super, Duration: length}, &sent, nil)
	time.Sleep(200 * time.Millisecond)
	// The rest, which is to get through.
	const pings, rest = 100, 1100 * time.Millisecond
	var octets [2]uint64
	if err := in.client[1].Call("Agent.TCPReceived", traffic.Empty{}, &octets[0]); err != nil {
		return o, err
	}
	var tcp traffic.TCPSent
	tcpCall := in.client[0].Go("Agent.TCPSend", traffic.TCPSend{To: in.b.inner, Streams: 1, Duration: rest}, &tcp, nil)
	var besides int
	besideCall := in.client[0].Go("Agent.BesideSend", traffic.BesideSend{To: in.b.inner, Run: in.run, Every: 2 * time.Millisecond, Duration: rest}, &besides, nil)
	r := in.a.Run("ping", "-n", "-i", "0.01", "-c", strconv.Itoa(pings), "-W", "1", in.a.innerPeer.String())
	full, err := resident(in.daemons)
	if err != nil {
		return o, err
	}
	for _, c := range []*rpc.Call{call, tcpCall, besideCall} {
		if <-c.Done; c.Error != nil {
			return o, c.Error
		}
	}
	var got traffic.UDPCount
	var delays []float64
	if err := errors.Join(
		in.client[1].Call("Agent.UDPCount", in.run, &got),
		in.client[1].Call("Agent.Beside", in.run, &delays),
		in.client[1].Call("Agent.TCPReceived", traffic.Empty{}, &octets[1]),
	); err != nil {
		return o, err
	}
	after, err := in.drops(each)
	if err != nil {
		return o, err
	}
	rtts := parsePing(r.Out)
	if len(rtts) < pings/20 {
		return o, fmt.Errorf("overload: %d of %d pings answered", len(rtts), pings)
	}
	if len(delays) == 0 {
		return o, fmt.Errorf("overload: none of %d datagrams of the flow came", besides)
	}
	o.lost = max(1-float64(len(rtts))/pings, 1-float64(len(delays))/float64(besides))
	o.flow = stat.Quantile(delays, 0.99)
	o.rtt = tcp.RTT.Seconds()
	o.tcp = float64(octets[1]-octets[0]) * 8 / rest.Seconds()
	o.sent = float64(sent.Packets) / sent.Elapsed.Seconds()
	o.ping = stat.Quantile(rtts, 0.99)
	o.memory = float64(max(0, full-idle))
	if lost := float64(sent.Packets) - float64(got.Packets); lost > 0 {
		o.counted = min(1, before.until(after)/lost)
	}
	return o, nil
}

// tally is what counts losses on the way, at both ends: the interfaces, sockets
// that were full, and, where it is missiu, its own counters.
type tally struct {
	lost int
	// Of sockets of port 4500: messages that found them full, among lost as one
	// each, and what messages hold on the average.
	full, messages, packets int
}

// until is how many packets were lost between two tallies.
func (t *tally) until(later *tally) float64 {
	n := float64(later.lost - t.lost)
	if m := later.messages - t.messages; m > 0 {
		n += float64(later.full-t.full) * max(0, float64(later.packets-t.packets)/float64(m)-1)
	}
	return n
}

// drops takes the tally. What a tunnel's device drops when datagrams are sent is
// frames of each datagrams.
func (in *instance) drops(each int) (*tally, error) {
	t := &tally{}
	for _, x := range in.both() {
		b, err := os.ReadFile(x.netFile("dev"))
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			dev, _, ok := strings.Cut(line, ":")
			if !ok {
				continue
			}
			for _, c := range []string{"rx_dropped", "tx_dropped"} {
				n, err := parseNetDev(line, strings.TrimSpace(dev), c)
				if err != nil {
					return nil, err
				}
				if name := strings.TrimSpace(dev); c == "tx_dropped" && name != "eth0" && name != "lo" {
					n *= each
				}
				t.lost += n
			}
		}
		for _, f := range []string{"snmp", "snmp6"} {
			b, err := os.ReadFile(x.netFile(f))
			if err != nil {
				return nil, err
			}
			t.lost += parseFull(string(b))
		}
		if strings.HasPrefix(in.ID, report.Missiu) {
			if err := in.t.Try(func(lab.TB) {
				c := x.Status().Counters
				t.lost += drops(c) + c["wire_kernel_drops"]
				t.full += c["udp_kernel_drops"]
				t.messages += c["udp_messages"]
				t.packets += c["in_protected"] + c["drop_in_overload"]
			}); err != nil {
				return nil, err
			}
		}
	}
	return t, nil
}

// drops adds up missiu's counters of packets dropped.
func drops(counters map[string]int) (sum int) {
	for k, v := range counters {
		if strings.HasPrefix(k, "drop_") {
			sum += v
		}
	}
	return sum
}

// parseFull finds the datagrams that found a socket full in the text of
// /proc/net/snmp or snmp6.
func parseFull(text string) int {
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && f[0] == "Udp6RcvbufErrors":
			n, _ := strconv.Atoi(f[1])
			return n
		case len(f) > 1 && f[0] == "Udp:" && names == nil:
			names = f
		case len(f) > 1 && f[0] == "Udp:":
			for i, name := range names {
				if name == "RcvbufErrors" && i < len(f) {
					n, _ := strconv.Atoi(f[i])
					return n
				}
			}
		}
	}
	return 0
}

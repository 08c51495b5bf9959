package ike

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"syscall"
	"time"

	"github.com/missiu/missiu/pkg/ike/pad"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
	"go.uber.org/zap"
)

// Config is what a Daemon needs. The functions are its ways to the outside.
type Config struct {
	Local []netip.Addr // our addresses, at least one
	Rules *pad.DB
	// Connect lists peers to negotiate with at start, once policy for them is
	// there.
	Connect []netip.Addr
	Limits  Limits
	// IKEPort and NATTPort are our ports; 0 means 500 and 4500.
	IKEPort, NATTPort uint16

	// Listen opens the IKE port of one address.
	Listen func(netip.AddrPort) (Conn, error)
	// Dial connects to missiu.
	Dial func(context.Context) (KeySocket, error)
	// Addrs are our addresses that may be used now, those of Local among them, best
	// first; nil: Local, for ever. It is asked at start and when AddrsChange has
	// something; RoutesChange tells that paths may not work any more. Either may be
	// nil.
	Addrs                     func() []netip.Addr
	AddrsChange, RoutesChange <-chan struct{}
	// Resolve finds the addresses of a host name. May be nil.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)
	// DialNATT connects to missiu's UDP port 4500. May be nil.
	DialNATT func(context.Context) (Conn, error)
	// Wait is how long the first connection to missiu may take; 0 means 10 s.
	Wait time.Duration
	// Ready is called once sockets are open and missiu has answered. May be nil.
	Ready func()
	Log   *zap.Logger
	// Journal remembers the SAs in missiu that are ours; may be nil.
	Journal *Journal
	// KeyLog takes the keys of every SA; nil, as it should be: nobody does.
	KeyLog *KeyLog
	Rand   io.Reader // nil means crypto/rand
}

// Limits protect against floods; zero fields take the defaults. They are those of
// ike.conf, where cookie_threshold 0 is AlwaysCookie.
type Limits struct {
	// CookieThreshold half-open IKE SAs are allowed before cookies are demanded
	// from all; 32. AlwaysCookie demands them always.
	CookieThreshold   int
	AlwaysCookie      bool
	HalfOpen          int           // half-open IKE SAs at a time; 1024
	HalfOpenPerSource int           // of one IPv4 address or IPv6 /64; 16
	Expire            time.Duration // a half-open IKE SA's time for IKE_AUTH; 60 s
}

// Conn carries IKE messages, without non-ESP marker.
type Conn interface {
	// Receive blocks for one message, reads it into b and returns its length
	// and the addresses it came to and from. After Close it returns an error
	// that wraps net.ErrClosed.
	Receive(b []byte) (n int, local, remote netip.AddrPort, err error)
	// Send sends b. On the NAT traversal port the marker is put in front,
	// except in front of a keepalive, the single octet 0xff.
	Send(b []byte, local, remote netip.AddrPort) error
	Close() error
}

// KeySocket is what the daemon uses of keysock.Client.
type KeySocket interface {
	Register(ctx context.Context, protos ...ipsec.Protocol) (keysock.Supported, error)
	Events() <-chan keysock.Event
	GetSPI(ctx context.Context, g keysock.GetSPI) (ipsec.SPI, error)
	Add(ctx context.Context, p *ipsec.SAParams, seq uint32) error
	Update(ctx context.Context, p *ipsec.SAParams, seq uint32) error
	Move(ctx context.Context, id ipsec.SAID, p *ipsec.SAParams) error
	Delete(ctx context.Context, id ipsec.SAID, src netip.Addr) error
	Get(ctx context.Context, id ipsec.SAID, src netip.Addr) (*keysock.SAInfo, error)
	AcquireFailed(ctx context.Context, seq uint32, errno syscall.Errno) error
	DumpPolicies(ctx context.Context) ([]*keysock.PolicyInfo, error)
	AddAddress(ctx context.Context, p netip.Prefix) error
	DeleteAddress(ctx context.Context, p netip.Prefix) error
	Close() error
}

var _ KeySocket = (*keysock.Client)(nil)

// Errors.
var (
	// ErrNoMissiu: missiu did not answer in time.
	ErrNoMissiu = errors.New("missiu does not answer")
	errDown     = errors.New("no connection to missiu")
	errFull     = errors.New("inbox full")
	errStopping = errors.New("ike is stopping")
)

// Fixed waits.
const (
	opTimeout     = 5 * time.Second         // a PF_KEY request
	readTimeout   = 2 * time.Minute         // reading the whole SPD
	settleWait    = 2 * time.Millisecond    // before it is read anew: changes come in bursts
	rereadWait    = time.Second             // after it could not be read
	mirrorWait    = 20 * time.Second        // of a request for what is being read
	missEvery     = 10 * time.Second        // between readings for requests that find nothing
	deferMax      = 4096                    // ACQUIREs that wait for it
	redialWait    = time.Second             // between attempts to reach missiu
	peerGrace     = 2500 * time.Millisecond // for answers to our Deletes on stopping
	dropGrace     = 300 * time.Millisecond  // for the removal of SAs then
	leftoverGrace = 5 * time.Second         // for the answer of a peer whose SA we take for a leftover
	startWait     = time.Second             // before start_action start tries again, doubling
	startMax      = time.Minute             // up to this
	restWait      = 10 * time.Second        // for the second SA of ESP inside AH, before it is missed
	rotateEvery   = 2 * time.Minute         // cookie secrets
	maxMessage    = 65535
	inboxLen      = 32      // datagrams of any size that wait for a lineage
	inboxMost     = 512     // and of small ones, such as the fragments of a message:
	inboxOctets   = 1 << 17 // so many in all
	callsLen      = 1024
	spiTries      = 3 // for one that is free for ESP and AH
)

func (l *Limits) defaults() {
	def := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	def(&l.CookieThreshold, 32)
	def(&l.HalfOpen, 1024)
	def(&l.HalfOpenPerSource, 16)
	if l.Expire == 0 {
		l.Expire = time.Minute
	}
}

func (c *Config) defaults() {
	c.Limits.defaults()
	if c.IKEPort == 0 {
		c.IKEPort = 500
	}
	if c.NATTPort == 0 {
		c.NATTPort = 4500
	}
	if c.Wait == 0 {
		c.Wait = 10 * time.Second
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
}

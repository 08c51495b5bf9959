package sa

import (
	"bytes"
	"crypto/sha256"
	"net/netip"
	"sync"
	"time"

	"github.com/missiu/missiu/pkg/crypto/aead"
	"github.com/missiu/missiu/pkg/crypto/keymat"
	"github.com/missiu/missiu/pkg/ike/proposal"
	"github.com/missiu/missiu/proto/ikev2"
)

// ikeSA is one IKE SA of a lineage.
type ikeSA struct {
	state         State
	initiator     bool // we are its original initiator: the Initiator flag
	local, remote SPI
	suite         proposal.IKESuite

	// Keys. keys holds SK_d, and SK_pi and SK_pr until AUTH is done.
	keys       *keymat.IKEKeys
	seal, open *sk

	// Requests that we send: a window of one (RFC 7296, 2.3).
	nextID uint32
	active task     // has the window, even while it waits for an SPI
	req    *request // is on its way
	asked  *sealed  // the request last answered, until authenticated
	then   task     // runs when active is over
	// strayed: the request last answered was sent by more than one way.
	strayed bool

	// Requests that we receive.
	expect    uint32            // the next one's message ID
	busy      bool              // request expect-1 is in work, not answered yet
	lastReq   [sha256.Size]byte // of its first datagram
	lastTotal int               // fragments in which it came; 0: it was whole
	lastOpen  *sk               // by which it was opened
	lastResp  *sealed           // answer to request expect-1, nil while there is none
	from      Datagram          // completed it
	limit     int               // octets of the fragments in which it came; 0: it was whole

	// Fragments of the next request, and of the response that we wait for.
	inRequest, inResponse reassembly

	hs *handshake // until authenticated

	created           time.Time
	rekeyAt, expireAt time.Time
	dropAt            time.Time // when it is forgotten though nobody deleted it

	follow *follow // additional key exchanges that the peer has begun

	// Rekeying. ni and nr are the nonces of the exchange that made this IKE
	// SA; peerNew is what the peer made of it while our own request to rekey
	// was on its way, until it is decided which of the two stays.
	ni, nr  []byte
	peerNew *ikeSA
}

// request is what we sent and must be able to send again, octet by octet.
type request struct {
	id       uint32
	exchange ikev2.ExchangeType
	*sealed
	local, remote netip.AddrPort
	via           path          // for the first transmissions; zero: the path in use
	strayed       bool          // sent by more than one way
	sent          int           // transmissions
	wait          time.Duration // after the last of them
	due           time.Time
}

// spis returns the SPIs in the order of the header.
func (i *ikeSA) spis() (initiator, responder SPI) {
	if i.initiator {
		return i.local, i.remote
	}
	return i.remote, i.local
}

func (i *ikeSA) header(x ikev2.ExchangeType, id uint32, response bool) ikev2.Header {
	h := ikev2.Header{Exchange: x, MessageID: id}
	h.InitiatorSPI, h.ResponderSPI = i.spis()
	if i.initiator {
		h.Flags |= ikev2.FlagInitiator
	}
	if response {
		h.Flags |= ikev2.FlagResponse
	}
	return h
}

// setKeys makes the ciphers; k's encryption and integrity keys are wiped.
func (i *ikeSA) setKeys(k *keymat.IKEKeys) error {
	s := i.suite
	ini, err := aead.New(s.Encr, k.EI, s.Integ, k.AI)
	if err != nil {
		return err
	}
	res, err := aead.New(s.Encr, k.ER, s.Integ, k.AR)
	if err != nil {
		return err
	}
	k.EI.Wipe()
	k.ER.Wipe()
	k.AI.Wipe()
	k.AR.Wipe()
	i.keys = k
	i.seal, i.open = &sk{c: ini}, &sk{c: res}
	if !i.initiator {
		i.seal, i.open = i.open, i.seal
	}
	return nil
}

func (i *ikeSA) suiteKeys() keymat.IKESuite {
	return keymat.IKESuite{PRF: i.suite.PRF, Encr: i.suite.Encr, EncrBits: i.suite.Bits, Integ: i.suite.Integ}
}

// waiting takes the window from a task that has sent nothing yet, because it
// waits for an SPI, and returns the task; else nil.
func (i *ikeSA) waiting(s *SA) *createChild {
	t, ok := i.active.(*createChild)
	if !ok || i.req != nil {
		return nil
	}
	i.active, t.o = nil, nil
	delete(s.spiWaits, t.token)
	return t
}

// inFlight returns the offer of a child SA that the peer may have accepted
// already, or nil.
func (i *ikeSA) inFlight() *offer {
	if t, ok := i.active.(*createChild); ok && i.req != nil {
		return t.o
	}
	return nil
}

// wipe forgets all secrets.
func (i *ikeSA) wipe() {
	if i.keys != nil {
		i.keys.Wipe()
		i.keys = nil
	}
	i.seal, i.open, i.lastOpen = nil, nil, nil
	i.inRequest.reset()
	i.inResponse.reset()
	i.hs.wipe()
	i.hs = nil
	clear(i.ni)
	clear(i.nr)
}

// setLast notes the request to be known again by b.
func (i *ikeSA) setLast(b []byte) {
	_, i.lastTotal, _ = fragmentNumbers(b)
	i.lastReq, i.lastOpen = sha256.Sum256(b), i.open
}

// isLast reports whether b is the request last answered, or in work, again.
func (i *ikeSA) isLast(b []byte) bool {
	h := sha256.Sum256(b)
	return bytes.Equal(h[:], i.lastReq[:])
}

// sk protects one direction of an IKE SA for proto/ikev2.
type sk struct {
	c        *aead.Cipher
	n        uint64 // messages sealed: IVs never repeat
	verified bool   // the last Open found the ICV right
}

func (k *sk) BlockLen() int { return k.c.BlockLen() }
func (k *sk) IVLen() int    { return k.c.IVLen() }
func (k *sk) ICVLen() int   { return k.c.ICVLen() }

// scratches are shared: one is larger than all else that an IKE SA needs to live.
var scratches = sync.Pool{New: func() any { return new(aead.Scratch) }}

func (k *sk) Seal(aad, body []byte) error {
	s := scratches.Get().(*aead.Scratch)
	defer scratches.Put(s)
	iv, rest := body[:k.c.IVLen()], body[k.c.IVLen():]
	k.c.PutIV(s, iv, k.n)
	k.n++
	return k.c.Seal(s, rest, aad, iv, rest[:len(rest)-k.c.ICVLen()], nil)
}

func (k *sk) Open(aad, body []byte) ([]byte, error) {
	iv, ct := body[:k.c.IVLen()], body[k.c.IVLen():]
	plain := make([]byte, len(ct)-k.c.ICVLen())
	s := scratches.Get().(*aead.Scratch)
	defer scratches.Put(s)
	if err := k.c.Open(s, plain, aad, iv, ct, nil); err != nil {
		return nil, err
	}
	k.verified = true
	return plain, nil
}

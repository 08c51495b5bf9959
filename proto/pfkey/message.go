package pfkey

import (
	"encoding/binary"
	"errors"
)

var host = binary.NativeEndian

// HeaderLen is the length of the base header in octets.
const HeaderLen = lenHeader

// Header is the base header without version and length, which follow from the message.
type Header struct {
	Type     MsgType
	Errno    uint8
	SAType   SAType
	Reserved uint16 // 0 in requests; a reference count in policy answers of Linux
	Seq, Pid uint32
}

// Message is a message with the extensions that it has; those absent are nil.
type Message struct {
	Header
	SA                  *SA
	SA2                 *SA2
	Current, Soft, Hard *Lifetime
	Policy              *Policy
	Src, Dst, Proxy     *Address
	EncrKey, AuthKey    *Key
	IdentSrc, IdentDst  *Identity
	Sensitivity         *Sensitivity
	Proposal            *Proposal
	SupportedAuth       *Supported
	SupportedEncr       *Supported
	SPIRange            *SPIRange
	KMPrivate           *KMPrivate
	NATT                *NATT
	NATTSPort           *NATTPort
	NATTDPort           *NATTPort
	NATTOA              *Address
	SecCtx              *SecCtx
	KMAddress           *KMAddress
	Filter              *Filter

	// Private ones.
	OptIn        *OptIn
	SAMore       *SAMore
	TSSrc, TSDst *TSList
	Flow         *Flow
	SADst        *Address
	Blob         *Blob
	Count        *Count
	PolicyMore   *PolicyMore
	Shapes       *Shapes
	SASeq        *Count
	SACPI        *Count
	Idle         *Lifetime
	Queue        *Queue

	HomeSrc, HomeDst *Address
}

// ParseHeader reads and checks the header of the datagram b: EMSGSIZE for less
// than 16 octets or a wrong length field, EINVAL for another version or a type
// that does not exist. The header is valid whenever b has 16 octets. Reserved
// is for the caller to check, since it is not zero in all answers.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < lenHeader {
		return Header{}, tooLong("%d octets, want a header of %d", len(b), lenHeader)
	}
	h := Header{
		Type: MsgType(b[1]), Errno: b[2], SAType: SAType(b[3]),
		Reserved: host.Uint16(b[6:]), Seq: host.Uint32(b[8:]), Pid: host.Uint32(b[12:]),
	}
	if b[0] != Version {
		return h, invalid("version %d, want %d", b[0], Version)
	}
	if !h.Type.Valid() {
		return h, invalid("type %d does not exist", b[1])
	}
	if n := int(host.Uint16(b[4:])); n*wordLen != len(b) {
		return h, tooLong("length field %d words, datagram %d octets", n, len(b))
	}
	return h, nil
}

// Split cuts a datagram of several messages behind the first; what is not a
// message and more is first, for ParseHeader to judge.
func Split(b []byte) (first, rest []byte) {
	if len(b) > lenHeader {
		if n := int(host.Uint16(b[4:])) * wordLen; n >= lenHeader && n < len(b) {
			return b[:n:n], b[n:]
		}
	}
	return b, nil
}

// Append appends h with the length of a message of only a header.
func (h Header) Append(b []byte) []byte {
	b = append(b, Version, byte(h.Type), h.Errno, byte(h.SAType))
	b = host.AppendUint16(b, lenHeader/wordLen)
	b = host.AppendUint16(b, h.Reserved)
	b = host.AppendUint32(b, h.Seq)
	return host.AppendUint32(b, h.Pid)
}

// Decode reads the datagram b; keys and other octet strings of the result are
// part of b. Unknown extensions are skipped (RFC 2367, 2.3). Errors are *Error.
func Decode(b []byte) (*Message, error) {
	h, err := ParseHeader(b)
	if err != nil {
		return nil, err
	}
	m := &Message{Header: h}
	var seen extSet
	for b = b[lenHeader:]; len(b) > 0; {
		var t ExtType
		var e []byte
		if t, e, b, err = nextExt(b); err != nil {
			return nil, err
		}
		slot := m.slot(t, false)
		if slot == nil {
			continue
		}
		if seen.add(t) {
			return nil, &Error{Errno: einval, Ext: t, What: "twice"}
		}
		if err := slot.decode(e); err != nil {
			var pe *Error
			if errors.As(err, &pe) {
				pe.Ext = t
			}
			return nil, err
		}
	}
	return m, nil
}

// nextExt takes the extension at the front of b, its header included. It is
// the only place that turns words of an extension into octets.
func nextExt(b []byte) (t ExtType, ext, rest []byte, err error) {
	if len(b) < 4 {
		return 0, nil, nil, invalid("%d octets left, want an extension", len(b))
	}
	n := int(host.Uint16(b)) * wordLen
	t = ExtType(host.Uint16(b[2:]))
	if n == 0 || n > len(b) || t == ExtReserved {
		return 0, nil, nil, invalid("extension of type %d and %d octets, %d left", t, n, len(b))
	}
	return t, b[:n:n], b[n:], nil
}

// Append appends the message, in an order that all known programs accept.
// EMSGSIZE if a length does not fit its field, EINVAL for values that have no
// encoding.
func (m *Message) Append(b []byte) ([]byte, error) {
	start := len(b)
	b = m.Header.Append(b)
	for _, t := range order {
		s := m.slot(t, true)
		if s == nil {
			continue
		}
		at := len(b)
		b = append(b, 0, 0, 0, 0)
		var err error
		if b, err = s.append(b); err != nil {
			var pe *Error
			if errors.As(err, &pe) {
				pe.Ext = t
			}
			return b[:start], err
		}
		for (len(b)-at)%wordLen != 0 {
			b = append(b, 0)
		}
		words := (len(b) - at) / wordLen
		if words > 0xffff {
			return b[:start], &Error{Errno: emsgsize, Ext: t, What: "longer than its length field can say"}
		}
		host.PutUint16(b[at:], uint16(words))
		host.PutUint16(b[at+2:], uint16(t))
	}
	words := (len(b) - start) / wordLen
	if words > maxMessageWords {
		return b[:start], tooLong("%d words", words)
	}
	host.PutUint16(b[start+4:], uint16(words))
	return b, nil
}

// extSet remembers the known extensions that a message had.
type extSet uint64

func (s *extSet) add(t ExtType) (again bool) {
	bit := uint(t)
	if t.Private() {
		bit = 32 + uint(t&0x1f)
	}
	again = *s&(1<<bit) != 0
	*s |= 1 << bit
	return again
}

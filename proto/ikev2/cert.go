package ikev2

import "golang.org/x/crypto/cryptobyte"

// Cert is the Certificate payload (RFC 7296, 3.6).
type Cert struct {
	Encoding CertEncoding
	Data     []byte
}

// PayloadType is PayloadCERT.
func (*Cert) PayloadType() PayloadType { return PayloadCERT }

// Append appends encoding and data.
func (c *Cert) Append(b []byte) ([]byte, error) {
	return append(append(b, uint8(c.Encoding)), c.Data...), nil
}

func parseCert(b []byte) (Payload, error) {
	s := cryptobyte.String(b)
	var enc uint8
	if !s.ReadUint8(&enc) {
		return nil, errShort
	}
	return &Cert{Encoding: CertEncoding(enc), Data: s}, nil
}

// CertReq is the Certificate Request payload (RFC 7296, 3.7).
type CertReq struct {
	Encoding  CertEncoding
	Authority []byte // hashes of trust anchors' keys, 20 octets each
}

// PayloadType is PayloadCERTREQ.
func (*CertReq) PayloadType() PayloadType { return PayloadCERTREQ }

// Append appends encoding and authorities.
func (c *CertReq) Append(b []byte) ([]byte, error) {
	return append(append(b, uint8(c.Encoding)), c.Authority...), nil
}

func parseCertReq(b []byte) (Payload, error) {
	s := cryptobyte.String(b)
	var enc uint8
	if !s.ReadUint8(&enc) {
		return nil, errShort
	}
	return &CertReq{Encoding: CertEncoding(enc), Authority: s}, nil
}

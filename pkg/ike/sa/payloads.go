package sa

import (
	"fmt"
	"slices"

	"github.com/missiu/missiu/proto/ikev2"
)

// shape is what a message of an exchange consists of (RFC 7296, 1.2 to 1.4 and
// appendix C). Payloads in required stand exactly once, in optional at most
// once, in many as often as they like; Notify and Vendor ID may stand in every
// message. What is not listed is unexpected: no handler sees it.
type shape struct {
	name                     string
	required, optional, many []ikev2.PayloadType
	// An answer that refuses the exchange by an error notify needs none of the
	// required payloads.
	refusable bool
}

const (
	pSA, pKE, pNonce = ikev2.PayloadSA, ikev2.PayloadKE, ikev2.PayloadNonce
	pIDi, pIDr       = ikev2.PayloadIDi, ikev2.PayloadIDr
	pAUTH            = ikev2.PayloadAUTH
	pTSi, pTSr       = ikev2.PayloadTSi, ikev2.PayloadTSr
	pD               = ikev2.PayloadDelete
	pCP              = ikev2.PayloadCP
	pCERT, pCERTREQ  = ikev2.PayloadCERT, ikev2.PayloadCERTREQ
)

type types = []ikev2.PayloadType

var (
	shapeInitRequest  = shape{name: "IKE_SA_INIT request", required: types{pSA, pKE, pNonce}}
	shapeInitResponse = shape{name: "IKE_SA_INIT response", required: types{pSA, pKE, pNonce}, many: types{pCERTREQ}, refusable: true}
	// Without AUTH the initiator wants EAP, which the handler refuses.
	shapeAuthRequest          = shape{name: "IKE_AUTH request", required: types{pIDi}, optional: types{pIDr, pAUTH, pCP, pSA, pTSi, pTSr}, many: types{pCERT, pCERTREQ}}
	shapeAuthResponse         = shape{name: "IKE_AUTH response", required: types{pIDr, pAUTH}, optional: types{pCP, pSA, pTSi, pTSr}, many: types{pCERT}, refusable: true}
	shapeChildRequest         = shape{name: "CREATE_CHILD_SA request", required: types{pSA, pNonce, pTSi, pTSr}, optional: types{pKE}}
	shapeChildResponse        = shape{name: "CREATE_CHILD_SA response", required: types{pSA, pNonce, pTSi, pTSr}, optional: types{pKE}, refusable: true}
	shapeRekeyRequest         = shape{name: "CREATE_CHILD_SA request for an IKE SA", required: types{pSA, pNonce, pKE}}
	shapeRekeyResponse        = shape{name: "CREATE_CHILD_SA response for an IKE SA", required: types{pSA, pNonce, pKE}, refusable: true}
	shapeIntermediateRequest  = shape{name: "IKE_INTERMEDIATE request", required: types{pKE}}
	shapeIntermediateResponse = shape{name: "IKE_INTERMEDIATE response", required: types{pKE}, refusable: true}
	shapeFollowRequest        = shape{name: "IKE_FOLLOWUP_KE request", required: types{pKE}}
	shapeFollowResponse       = shape{name: "IKE_FOLLOWUP_KE response", required: types{pKE}, refusable: true}
	shapeInformational        = shape{name: "INFORMATIONAL", many: types{pD}}
)

// check verifies that ps has the shape, and returns the payloads that belong to
// it. The error says what is missing or too much.
func (sh shape) check(ps []ikev2.Payload) ([]ikev2.Payload, error) {
	var kept []ikev2.Payload
	count := map[ikev2.PayloadType]int{}
	refused := false
	for _, p := range ps {
		t := p.PayloadType()
		if n, ok := p.(*ikev2.Notify); ok {
			refused = refused || n.Type.IsError()
		}
		single := slices.Contains(sh.required, t) || slices.Contains(sh.optional, t)
		if count[t]++; single && count[t] > 1 {
			return nil, fmt.Errorf("%s: payload %v twice", sh.name, t)
		}
		if single || slices.Contains(sh.many, t) || t == ikev2.PayloadNotify {
			kept = append(kept, p)
		}
	}
	if !(refused && sh.refusable) {
		for _, t := range sh.required {
			if count[t] == 0 {
				return nil, fmt.Errorf("%s: payload %v missing", sh.name, t)
			}
		}
	}
	return kept, nil
}

// childTriple reports whether SA, TSi and TSr are all there; an error if some are.
func childTriple(ps []ikev2.Payload) (bool, error) {
	n := 0
	for _, p := range ps {
		switch p.PayloadType() {
		case pSA, pTSi, pTSr:
			n++
		}
	}
	if n != 0 && n != 3 {
		return false, fmt.Errorf("of SA, TSi and TSr only some are there")
	}
	return n == 3, nil
}

// refusal returns the first error notify.
func refusal(ps []ikev2.Payload) *ikev2.Notify {
	for _, p := range ps {
		if n, ok := p.(*ikev2.Notify); ok && n.Type.IsError() {
			return n
		}
	}
	return nil
}

func notify(t ikev2.NotifyType, data ...byte) *ikev2.Notify {
	return &ikev2.Notify{Type: t, Data: data}
}

// critical returns the answer to an unknown critical payload, or nil.
func critical(ps []ikev2.Payload) *ikev2.Notify {
	if t, ok := ikev2.UnsupportedCritical(ps); ok {
		return notify(ikev2.UNSUPPORTED_CRITICAL_PAYLOAD, byte(t))
	}
	return nil
}

// invalidKE asks for another key exchange method (RFC 7296, 1.2).
func invalidKE(ke uint16) *ikev2.Notify {
	return notify(ikev2.INVALID_KE_PAYLOAD, byte(ke>>8), byte(ke))
}

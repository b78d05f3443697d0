//! Conversations as byte strings.

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn lease() -> Lease {
    Lease {
        mac: MAC,
        address: Ipv4Addr::new(10, 0, 2, 2),
        mask: Ipv4Addr::new(255, 255, 255, 0),
        gateway: Ipv4Addr::new(10, 0, 2, 1),
        dns: vec![Ipv4Addr::new(10, 96, 0, 10), Ipv4Addr::new(10, 96, 0, 11)],
        search: vec!["org-a.svc.cluster.local".into(), "cluster.local".into()],
        hostname: "vm-a".into(),
        mtu: 1450,
        options: Vec::new(),
        boot_server: None,
    }
}

fn request(kind: u8, options: &[u8]) -> Vec<u8> {
    let mut request = vec![0; FIXED];
    request[..4].copy_from_slice(&[1, 1, 6, 0]);
    request[4..8].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
    request[28..34].copy_from_slice(&MAC);
    request[236..].copy_from_slice(&MAGIC);
    request.extend_from_slice(&[option::PAD, option::MESSAGE_TYPE, 1, kind]);
    request.extend_from_slice(options);
    request.push(option::END);
    request
}

/// Options of a message, parts of one code joined.
fn options(message: &[u8]) -> std::collections::BTreeMap<u8, Vec<u8>> {
    let mut options = std::collections::BTreeMap::<u8, Vec<u8>>::new();
    let mut rest = &message[FIXED..];
    while rest[0] != option::END {
        let length = usize::from(rest[1]);
        options
            .entry(rest[0])
            .or_default()
            .extend_from_slice(&rest[2..2 + length]);
        rest = &rest[2 + length..];
    }
    options
}

#[test]
fn dhcp_offer_then_ack_carry_the_lease() {
    let offer = lease().answer(&request(message::DISCOVER, &[])).unwrap();
    assert_eq!(
        (offer[0], &offer[4..8], &offer[16..20]),
        (REPLY, &[0xde, 0xad, 0xbe, 0xef][..], &[10, 0, 2, 2][..])
    );
    assert!(offer.len() >= MIN_REPLY);
    let told = options(&offer);
    assert_eq!(told[&option::MESSAGE_TYPE], [message::OFFER]);
    assert_eq!(told[&option::DOMAIN_NAME_SERVER], [10, 96, 0, 10, 10, 96, 0, 11]);
    assert_eq!(told[&option::HOST_NAME], b"vm-a");
    assert_eq!(told[&option::INTERFACE_MTU], 1450u16.to_be_bytes());
    assert_eq!(
        told[&option::DOMAIN_SEARCH],
        b"\x05org-a\x03svc\x07cluster\x05local\0\x07cluster\x05local\0"
    );
    let chosen = [
        &[option::REQUESTED_ADDRESS, 4, 10, 0, 2, 2][..],
        &[option::SERVER_IDENTIFIER, 4, 10, 0, 2, 1],
    ]
    .concat();
    let ack = lease().answer(&request(message::REQUEST, &chosen)).unwrap();
    assert_eq!(options(&ack)[&option::MESSAGE_TYPE], [message::ACK]);
}

#[test]
fn dhcp_refuses_a_lease_from_elsewhere() {
    let nak = lease()
        .answer(&request(
            message::REQUEST,
            &[option::REQUESTED_ADDRESS, 4, 192, 168, 0, 7],
        ))
        .unwrap();
    assert_eq!(options(&nak)[&option::MESSAGE_TYPE], [message::NAK]);
    assert_eq!(nak[16..20], [0; 4]);
}

#[test]
fn dhcp_ignores_what_is_not_for_it() {
    let mut other = request(message::DISCOVER, &[]);
    other[33] = 9;
    assert_eq!(lease().answer(&other), None, "another client");
    let elsewhere = [option::SERVER_IDENTIFIER, 4, 10, 9, 9, 9];
    assert_eq!(
        lease().answer(&request(message::REQUEST, &elsewhere)),
        None,
        "another server"
    );
    assert_eq!(lease().answer(&request(7, &[])), None, "a release");
}

#[test]
fn dhcp_survives_every_cut_and_every_flipped_byte() {
    let good = request(message::REQUEST, &[option::REQUESTED_ADDRESS, 4, 10, 0, 2, 2]);
    for length in 0..good.len() {
        let _ = lease().answer(&good[..length]);
    }
    for at in 0..good.len() {
        for value in [0, 1, 53, 127, 255] {
            let mut bad = good.clone();
            bad[at] = value;
            let _ = lease().answer(&bad);
        }
    }
    let endless = request(message::DISCOVER, &[option::HOST_NAME, 255, 1]);
    assert_eq!(lease().answer(&endless), None);
}

#[test]
fn dhcp_tells_further_options_and_the_boot_server() {
    assert_eq!(
        lease().answer(&request(message::DISCOVER, &[])).unwrap()[20..24],
        [10, 0, 2, 1]
    );
    let further = Lease {
        options: vec![(67, b"boot.ipxe".to_vec()), (240, vec![b'x'; 255])],
        boot_server: Some(Ipv4Addr::new(192, 0, 2, 9)),
        ..lease()
    };
    let offer = further.answer(&request(message::DISCOVER, &[])).unwrap();
    assert_eq!(offer[20..24], [192, 0, 2, 9]);
    let told = options(&offer);
    assert_eq!((&told[&67][..], told[&240].len()), (&b"boot.ipxe"[..], 255));
    assert_eq!(told[&option::ROUTER], [10, 0, 2, 1], "the router stays what it is");
    let wrong = request(message::REQUEST, &[option::REQUESTED_ADDRESS, 4, 192, 168, 0, 7]);
    let nak = options(&further.answer(&wrong).unwrap());
    assert!(!nak.contains_key(&67), "a refusal tells nothing");
}

#[test]
fn dhcp_splits_long_options() {
    let search = (0..32).map(|i| format!("domain-{i}.example.com")).collect();
    let offer = Lease { search, ..lease() }
        .answer(&request(message::DISCOVER, &[]))
        .unwrap();
    assert!(options(&offer)[&option::DOMAIN_SEARCH].len() > 255);
}

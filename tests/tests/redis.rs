//! A Redis under a writing client moves back and forth.

use dunlin_tests::stage::Stage;

#[test]
fn no_acknowledged_write_is_lost_in_twenty_moves() {
    const MIB: usize = 16;
    let stage = Stage::set().unwrap();
    stage.start_redis(MIB).unwrap();
    let writer = stage.start_writer().unwrap();
    for number in 0..20 {
        stage.move_redis(number, &writer, |_| {}).unwrap();
    }
    let book = writer.stop().unwrap();
    assert_eq!(stage.losses(&book, MIB).unwrap(), (0, 0), "lost writes, damaged values");
    assert!(20 < book.acknowledged());
    assert_eq!(book.unanswered(), 0, "the connection broke");
}
